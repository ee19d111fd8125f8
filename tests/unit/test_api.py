"""The package from Python: a run without Ray, its results, its encoder and features; settings by path."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hvp_ray as hvp
from hvp_ray.config import config_to_dict, with_settings
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.evaluation.encoder import Encoder
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.recipes import RECIPES, get_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hvp.Run:
    folder = tmp_path_factory.mktemp("api")
    settings = {"training.num_steps": 6, "training.images_per_step": 16, "tracking.uri": "none"}
    return hvp.pretrain(name="small", output=folder, seed=5, settings=settings, ray=False, progress=False)


def test_run_has_its_summary_curves_figures_and_settings(run: hvp.Run) -> None:
    assert run.summary["num_steps"] == 6 and run.config.run.seed == 5
    assert run.metrics["step"].iloc[-1] == 6
    assert run.metrics["train/loss"].iloc[-1] == pytest.approx(run.summary["loss_last"])
    assert run.figures["candidate_views"].size[0] > 100
    assert repr(run).startswith("Run(") and "6 steps" in repr(run)


def test_run_that_has_ended_is_returned(run: hvp.Run) -> None:
    before = (Path(run.path) / "summary.json").stat().st_mtime_ns
    settings = {"training.num_steps": 6, "training.images_per_step": 16, "tracking.uri": "none"}
    again = hvp.pretrain(name="small", output=Path(run.path).parent, seed=5, settings=settings, ray=False)
    assert again.path == run.path and (Path(run.path) / "summary.json").stat().st_mtime_ns == before


def test_existing_run_keeps_its_arm(run: hvp.Run) -> None:
    with pytest.raises(ConfigError, match="arm all-pairs is not allowed: the run small exists and keeps its settings"):
        hvp.pretrain(name="small", output=Path(run.path).parent, arm="all-pairs", ray=False)


def test_embedding_a_source_gives_the_features_of_the_evaluation(run: hvp.Run) -> None:
    config = run.config
    dataset = open_dataset(dataclasses.replace(config.data, test_fraction=0.0))
    pixels, _ = load_evaluation_pixels(dataset.source, np.arange(80), config.views, config.data)
    encoder = hvp.load_encoder(run.path)
    expected = extract_features(encoder.backbone, pixels, config.views, device=torch.device("cpu")).numpy()
    np.testing.assert_allclose(hvp.embed(encoder, "digits")[:80], expected, atol=1e-6)


def test_files_pillow_images_and_arrays_have_equal_features(run: hvp.Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    features = hvp.embed(run.encoder, [tmp_path / "image.png", image, pixels])
    assert features.shape == (3, 128) and features.dtype == np.float32
    assert (features == features[0]).all()
    assert run.encoder.prepare(image).shape == (3, run.encoder.size_px, run.encoder.size_px)


def test_pillow_images_are_turned_upright_and_scaled_as_their_files_are(run: hvp.Run, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    photograph = Image.fromarray(generator.integers(0, 256, (12, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    photograph.save(tmp_path / "turned.png", exif=exif)
    values = generator.integers(0, 4096, (12, 20)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    backbone = run.encoder.backbone
    ranged = Encoder(backbone, run.config.views, dataclasses.replace(run.config.data, intensity_range=(100.0, 4000.0)))
    for encoder, name in ((run.encoder, "turned.png"), (ranged, "deep.png")):
        features = encoder.embed([tmp_path / name, Image.open(tmp_path / name)])
        assert (features[0] == features[1]).all(), name
    with pytest.raises(
        DataError, match=r"mode I;16 has more than 8 bits per channel, and the run has no data.intensity"
    ):
        run.encoder.embed([Image.open(tmp_path / "deep.png")])


def test_features_are_those_of_evaluation_mode(run: hvp.Run) -> None:
    encoder = hvp.load_encoder(run.path)
    images = list(np.random.default_rng(0).integers(0, 256, (5, 12, 20, 3), dtype=np.uint8))
    expected, state = encoder.embed(images), {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    np.testing.assert_array_equal(encoder.embed(images), expected)
    assert encoder.backbone.training, "its mode is restored"
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def test_images_that_cannot_be_read_are_named(run: hvp.Run, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        run.encoder.embed([tmp_path / "broken.png"])
    with pytest.raises(DataError, match=r"expected \[H, W, 3\] of uint8"):
        run.encoder.embed([np.zeros((4, 4), np.uint8)])
    with pytest.raises(DataError, match="no images"):
        run.encoder.embed([])


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_replaced_by_path(name: str) -> None:
    recipe = get_recipe(name)
    changed = with_settings(
        recipe, {"training.epochs": 7, "data.source": Path("x"), "method.backbone.name": "resnet18"}
    )
    assert (changed.training.epochs, changed.data.source, changed.method.backbone.name) == (7, "x", "resnet18")
    back = {"training.epochs": recipe.training.epochs, "data.source": recipe.data.source}
    restored = with_settings(changed, back | {"method.backbone.name": recipe.method.backbone.name})
    assert config_to_dict(restored) == config_to_dict(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training.epoch": 3}, "there is no setting 'training.epoch' in simsiam-digits; did you mean training.epochs"),
        ({"training": 3}, "there is no setting 'training'"),
        ({"views.local_views.size_px": 4}, "there is no setting"),
        ({"training.epochs": 0}, "training.epochs=0 is not allowed: 1 or more"),
        ({"training.epochs": "many"}, "training.epochs='many' is not allowed"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_settings(get_recipe("simsiam-digits"), settings)


def test_run_of_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'asym-aug'"):
        hvp.pretrain(recipe="simclr-digits", arm="asymaug")


def test_importing_the_package_imports_no_library() -> None:
    program = "import sys, hvp_ray; print(sorted({'torch', 'ray', 'numpy', 'mlflow', 'tyro'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert result.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        hvp.pretrian  # noqa: B018
