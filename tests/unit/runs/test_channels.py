"""Runs on images that are not RGB: means are asked for or measured, every part of a run takes them, errors say what to do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hvp_ray as hvp
from hvp_ray.config import RunConfig, with_settings
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.channel_statistics import check_channels, measure_channels
from hvp_ray.runs.fit_recipe import fit_own_recipe
from hvp_ray.training.trainee import build_untrained_method
from tests.helpers import tiny_config

CHANNELS = 5


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 arrays of 5 channels in two classes: the second class is brighter in its last channel."""
    folder, generator = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    for index in range(48):
        pixels = generator.integers(0, 200, (36, 40, CHANNELS), dtype=np.uint8)
        pixels[..., -1] += 50 * (index % 2)
        place = folder / f"class-{index % 2}" / f"{index:02}.npy"
        place.parent.mkdir(exist_ok=True)
        np.save(place, pixels)
    return folder


def _config(arrays: Path, output: Path, **settings: Any) -> RunConfig:
    config = tiny_config(str(output), data={"source": str(arrays), "num_images": None, "channels": CHANNELS})
    small = {"views.mean": (0.4,) * CHANNELS, "views.std": (0.2,) * CHANNELS, "cluster.device": "cpu"}
    return with_settings(config, small | settings)


def test_statistics_are_those_of_the_training_images(arrays: Path, tmp_path: Path) -> None:
    config = _config(arrays, tmp_path)
    dataset = open_dataset(config.data)
    files = sorted(arrays.glob("*/*.npy"))
    used = np.stack([np.load(files[sample_id]) for sample_id in dataset.training_ids.tolist()]) / 255.0
    found = measure_channels(config.data, dataset)
    assert found.num_images == len(used)
    assert found.mean == pytest.approx(used.mean(axis=(0, 1, 2)), abs=1e-4)
    assert found.std == pytest.approx(used.std(axis=(0, 1, 2)), abs=1e-4)


def test_means_that_are_missing_are_measured_and_the_options_are_taken(arrays: Path, tmp_path: Path) -> None:
    config = _config(arrays, tmp_path, **{"views.mean": (0.4,) * 3, "views.std": (0.2,) * 3})
    dataset = open_dataset(config.data)
    with pytest.raises(
        ConfigError, match=r"have 3 value\(s\), but data.channels=5. Give what 38 sampled .* --views.std"
    ):
        check_channels(config, dataset)
    found = measure_channels(config.data, dataset)
    check_channels(with_settings(config, {"views.mean": found.mean, "views.std": found.std}), dataset)


def test_run_trains_evaluates_and_embeds_five_channels(arrays: Path, tmp_path: Path) -> None:
    settings = {
        "training.num_steps": 3,
        "tracking.num_figure_images": 2,
        "tracking.knn_images": 9,
        "data.channels": CHANNELS,
        "views.global_views.size_px": 32,
        "tracking.uri": "none",
    }
    run = hvp.pretrain(
        arrays, recipe="simsiam-own", name="five", output=tmp_path, settings=settings, ray=False, progress=False
    )
    assert run.summary["num_steps"] == 3 and 0.0 <= run.summary["knn_top1"] <= 1.0
    assert {"candidate_views", "neighbours"} <= set(run.figures)
    recorded = json.loads((tmp_path / "five" / "config.json").read_text())["config"]
    assert len(recorded["views"]["mean"]) == CHANNELS
    files = sorted(arrays.glob("*/*.npy"))
    features = hvp.embed(run.encoder, files[:3])
    pixels = [np.load(file) for file in files[:3]]
    assert np.array_equal(hvp.embed(run.encoder, pixels), features) and features.std() > 0
    with pytest.raises(DataError, match=r"expected \[H, W, 5\] of uint8, got \[8, 8, 3\]"):
        hvp.embed(run.encoder, [np.zeros((8, 8, 3), np.uint8)])
    again = hvp.load_encoder(run.path)
    assert np.array_equal(hvp.embed(again, files[:3]), features)


def test_own_recipe_measures_and_says_so(arrays: Path) -> None:
    asked = {"data.source": arrays, "data.channels": CHANNELS, "cluster.device": "cpu"}
    fitted = fit_own_recipe(with_settings(get_recipe("dino-own"), asked))
    assert len(fitted.config.views.mean) == len(fitted.config.views.std) == CHANNELS
    assert "measured on 38 images: --views.mean " in fitted.lines[-1]
    given = {"views.mean": (0.1,) * CHANNELS, "views.std": (0.3,) * CHANNELS}
    kept = fit_own_recipe(with_settings(get_recipe("dino-own"), asked | given))
    assert kept.config.views.mean == (0.1,) * CHANNELS and not any("measured" in line for line in kept.lines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster.renderer": "dali-cpu"}, "auto or cpu with data.channels=5: DALI renders RGB"),
        ({"method.backbone.in_channels": 3}, "method.backbone.in_channels=3 is not allowed: data.channels=5, or None"),
        ({"views.std": (0.2, 0.2)}, "5 values, as views.mean"),
    ],
)
def test_settings_that_contradict_each_other(
    arrays: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(arrays, tmp_path, **settings)


def test_source_of_another_number_of_channels_is_named_with_the_reason(arrays: Path, tmp_path: Path) -> None:
    config = _config(arrays, tmp_path, **{"data.channels": 4, "views.mean": (0.4,) * 3, "views.std": (0.2,) * 3})
    with pytest.raises(DataError, match="none of the sampled images can be used: .* no axis has data.channels=4"):
        check_channels(config, open_dataset(config.data))
    with pytest.raises(DataError, match="give --data.channels to read arrays"):
        open_dataset(dataclasses.replace(config.data, channels=3))


def test_arrays_beside_photographs_are_no_images_of_three_channels(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / f"{index}.png")
        np.save(tmp_path / f"{index}.npy", np.zeros((9, 9), np.uint8))
    config = get_recipe("simsiam-digits").data
    assert open_dataset(dataclasses.replace(config, source=str(tmp_path))).source.num_samples == 3
    assert open_dataset(dataclasses.replace(config, source=str(tmp_path), channels=1)).source.num_samples == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "resnet18", "stem": "cifar"},
        {"name": "resnet18", "stem": "imagenet"},
        {
            "name": "vit_tiny_patch16_224",
            "stem": "imagenet",
            "channels": None,
            "patch_px": 8,
            "image_px": 16,
            "depth": 1,
        },
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 12])
def test_every_kind_of_network_takes_the_channels(changes: dict[str, Any], channels: int, tmp_path: Path) -> None:
    settings = {f"method.backbone.{name}": value for name, value in changes.items()}
    config = with_settings(get_recipe("simsiam-digits"), settings | {"data.channels": channels})
    encoder = build_untrained_method(config).encoder.eval()
    with torch.no_grad():
        assert encoder(torch.zeros(2, channels, 16, 16)).ndim == 2
    with pytest.raises(RuntimeError):
        encoder(torch.zeros(2, 3, 16, 16))
