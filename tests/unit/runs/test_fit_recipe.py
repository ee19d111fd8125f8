"""Recipes that adapt themselves: to images, machine and weights; what is given counts; a run keeps what it began with."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hvp_ray as hvp
from hvp_ray import api
from hvp_ray.cli.command_line import parse_run
from hvp_ray.config import BackboneConfig, RunConfig, config_to_dict, with_settings
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.methods.backbones import CIFAR_LAYERS, build_backbone
from hvp_ray.recipes import get_recipe, own
from hvp_ray.recipes.own import OWN_RECIPES, USUAL, Circumstances
from hvp_ray.runs import fit_recipe
from hvp_ray.runs.fit_recipe import fit_own_recipe
from hvp_ray.training.trainee import build_untrained_method

CPU = dataclasses.replace(USUAL, device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(130):
        height, width = (40, 60) if index % 4 else (200, 150)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        place = folder / f"class-{index % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index:03}.png")
    return folder


def asked(recipe: str, images: Path, **settings: object) -> RunConfig:
    return with_settings(get_recipe(recipe), {"data.source": images, "cluster.device": "cpu", **settings})


@pytest.mark.parametrize("name", OWN_RECIPES)
@pytest.mark.parametrize("shorter_px", [20, 32, 100, 128, 500])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_recipe_is_a_valid_run_whose_network_takes_its_views(name: str, shorter_px: int, device: str) -> None:
    config = OWN_RECIPES[name](Circumstances(num_images=1_000, shorter_px=shorter_px, device=device))
    assert config.recipe == name and config.views.global_views.size_px <= max(32, shorter_px)
    with torch.no_grad():
        method = build_untrained_method(config)
        sizes = [config.views.global_views.size_px]
        sizes += [config.views.local_views.size_px] if config.views.local_views else []
        for size_px in sizes:
            assert size_px % method.patch_px == 0
            assert method.encoder.eval()(torch.zeros(1, 3, size_px, size_px)).ndim == 2


def test_more_images_make_fewer_epochs_and_released_weights_a_short_careful_run() -> None:
    few, many = (OWN_RECIPES["simsiam-own"](dataclasses.replace(USUAL, num_images=n)) for n in (50_000, 1_000_000))
    assert (few.training.epochs, many.training.epochs) == (400, 20)
    again = OWN_RECIPES["simsiam-own"](dataclasses.replace(USUAL, num_images=50_000, starts_from_weights=True))
    assert again.training.epochs == 100 and again.optimizer.layer_decay < 1.0
    assert again.optimizer.learning_rate_per_256 == pytest.approx(few.optimizer.learning_rate_per_256 / 10)


def test_recipe_follows_the_images_and_says_so(images: Path) -> None:
    fitted = fit_own_recipe(asked("simclr-own", images))
    config, text = fitted.config, "\n".join(fitted.lines)
    assert config.views.global_views.size_px == 32, "three quarters of the images are 40 px high"
    assert config.data.source == str(images)
    assert "simclr-own for 104 images of 40 px" in text
    for path in ("views.global_views.size_px", "training.epochs", "training.images_per_step"):
        assert f"--{path}" in text
    assert config.training.images_per_step == 16 and "30 negatives" in text


def test_what_is_given_counts(images: Path) -> None:
    given = {"training.epochs": 3, "method.backbone.name": "resnet34", "views.global_views.size_px": 48}
    config = fit_own_recipe(asked("simsiam-own", images, **given, **{"training.images_per_step": 26})).config
    assert (config.training.epochs, config.training.images_per_step) == (3, 26)
    assert (config.method.backbone.name, config.views.global_views.size_px) == ("resnet34", 48)
    words = ["simsiam-own", "--data.source", str(images), "--training.epochs", "3", "--cluster.device", "cpu"]
    assert parse_run(words, program="test", description="").training.epochs == 3


def test_setting_counts_if_it_is_given_also_with_the_value_that_the_recipe_shows(images: Path) -> None:
    shown = get_recipe("simsiam-own").method.backbone.name
    words = ["simsiam-own", "--data.source", str(images), "--cluster.device", "cpu"]
    assert parse_run(words, program="test", description="").method.backbone.name != shown
    config = parse_run([*words, "--method.backbone.name", shown], program="test", description="")
    assert config.method.backbone == BackboneConfig(name=shown, stem="cifar")
    config = parse_run([*words, "--training.images_per_step", "256"], program="test", description="")
    assert config.training.images_per_step == 256


@pytest.mark.parametrize(
    ("name", "size_px"), [*((name, 160) for name in OWN_RECIPES), ("simsiam-own", 16), ("simsiam-own", 320)]
)
def test_size_that_is_given_counts_where_the_recipe_as_shown_would_not_allow_it(
    name: str, size_px: int, images: Path
) -> None:
    words = [
        name,
        "--data.source",
        str(images),
        "--cluster.device",
        "cpu",
        "--views.global_views.size_px",
        str(size_px),
    ]
    config = parse_run(words, program="test", description="")
    given = {"data.source": images, "cluster.device": "cpu", "views.global_views.size_px": size_px}
    assert api._configure(name, given, None) == (config, False)
    assert config.views.global_views.size_px == size_px <= config.views.evaluation_resize_px
    with pytest.raises(ConfigError, match="views.evaluation_resize_px=8 is not allowed"):
        parse_run([*words, "--views.evaluation_resize_px", "8"], program="test", description="")


@pytest.mark.parametrize("name", OWN_RECIPES)
def test_network_that_is_given_gets_what_fits_it(name: str, images: Path) -> None:
    of_vit = fit_own_recipe(asked(name, images, **{"method.backbone.name": "vit_tiny_patch16_224"})).config
    assert (of_vit.method.backbone.stem, of_vit.method.backbone.patch_px) == ("imagenet", 4)
    build_untrained_method(of_vit)
    assert tuple(CIFAR_LAYERS) == own._CIFAR_STEMS


def test_arm_is_applied_once_and_an_existing_run_keeps_it(images: Path, tmp_path: Path) -> None:
    words = ["simclr-own", "--data.source", str(images), "--cluster.device", "cpu", "--run.name", "one"]
    words += ["--run.output", str(tmp_path), "--arm", "all-pairs"]
    begun = parse_run(words, program="test", description="")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text(json.dumps({"config": config_to_dict(begun)}))
    assert parse_run(words[:-2], program="test", description="") == begun
    with pytest.raises(ConfigError, match="arm all-pairs is not allowed: the run one exists and keeps its settings"):
        parse_run(words, program="test", description="")


def test_warm_up_follows_the_epochs_that_are_given(images: Path) -> None:
    config = fit_own_recipe(asked("dino-own", images, **{"training.epochs": 20})).config
    assert (config.training.epochs, config.optimizer.warmup_epochs) == (20, 2.0)


def test_images_per_step_follow_the_memory(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step fits 0.6 of the memory; if 16 images do not, the step is split."""
    base = OWN_RECIPES["simsiam-own"](dataclasses.replace(CPU, num_images=100_000, shorter_px=32))

    def fitted(memory_bytes: int) -> RunConfig:
        return fit_recipe._with_images_that_fit(base, CPU, memory_bytes)

    def peak(images: int, parts: int = 1) -> int:
        changes = {"training.images_per_step": images, "training.accumulation_steps": parts}
        return estimate_memory(with_settings(base, changes)).peak

    assert fitted(2**40).training.images_per_step == base.training.images_per_step
    least = fitted(int(peak(16) / 0.6) + 2**20)
    assert (least.training.images_per_step, least.training.accumulation_steps) == (16, 1)
    split = fitted(int(peak(16, 4) / 0.6) + 2**10)
    assert split.training.images_per_step == 16 and split.training.accumulation_steps > 1
    with pytest.raises(ConfigError, match="does not fit 0.0 GiB with two images at a time"):
        fitted(2**20)


def test_run_that_is_continued_keeps_the_settings_that_it_began_with(images: Path, tmp_path: Path) -> None:
    settings = {
        "training.num_steps": 2,
        "tracking.uri": "none",
        "cluster.device": "cpu",
        "tracking.num_figure_images": 0,
    }
    first = hvp.pretrain(
        images, recipe="simsiam-own", name="mine", output=tmp_path, settings=settings, ray=False, progress=False
    )
    asked_again = asked("simsiam-own", images, **{"run.name": "mine", "run.output": tmp_path})
    again = fit_own_recipe(asked_again)
    assert again.config.training == first.config.training and again.config.views == first.config.views
    assert again.lines == ("simsiam-own: the settings are those in config.json of the run 'mine'",)


def test_released_weights_are_found_in_the_question(images: Path, tmp_path: Path) -> None:
    network = get_recipe("simsiam-cifar10").method.backbone
    torch.save(build_backbone(network).state_dict(), tmp_path / "released.pth")
    fitted = fit_own_recipe(asked("simsiam-own", images, **{"training.initial_weights": tmp_path / "released.pth"}))
    assert "from released weights" in fitted.lines[0]
    assert fitted.config.method.backbone.channels is None, "the full width, which released weights have"
    build_untrained_method(fitted.config)


def test_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in"):
        fit_own_recipe(asked("simsiam-own", tmp_path))
