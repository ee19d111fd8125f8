"""Recipes: every hyper-parameter of the sources' tables, and one step of each ImageNet recipe at full size."""

import ctypes
import dataclasses
import gc
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from hvp_ray.config import Rule, RunConfig, config_from_dict, config_to_dict
from hvp_ray.costs.imaginary import made_up_batch
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.costs.operations import count_operations
from hvp_ray.distributed.world import World
from hvp_ray.recipes import RECIPES, get_recipe
from hvp_ray.selection import hard_step
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import build_trainee

IMAGENET = [name for name in RECIPES if "-imagenet-" in name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_json_and_says_how_to_run_it(name: str) -> None:
    config = get_recipe(name)
    assert config.recipe == name
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    page = RECIPES[name].__doc__ or ""
    assert f"hvp-ray pretrain {name}" in page
    if "digits" not in name and "small" not in name:
        assert "Source:" in page or "Settings are this project's" in page or "Inferred" in page
        assert "Expected:" in page or "No reference number" in page
        assert "Not yet" in page


TABLE: dict[str, dict[str, Any]] = {
    # reference: name -> dotted setting -> value
    "simsiam-imagenet-r50-100ep": {
        "optimizer.name": "sgd",
        "optimizer.learning_rate_per_256": 0.05,
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_exempts_vectors": False,
        "optimizer.schedule": "cosine-per-epoch",
        "optimizer.constant_predictor_rate": True,
        "training.images_per_step": 256,
        "views.global_views.even.crop_scale": (0.2, 1.0),
        "views.global_views.even.interpolation": "bilinear",
        "views.global_views.even.blur_kernel_px": 9,
        "views.evaluation_interpolation": "bilinear",
        "views.evaluation_resize_px": 256,
        "method.backbone.zero_init_residual": True,
    },
    "simsiam-cifar10": {
        "optimizer.learning_rate_per_256": 0.06,
        "optimizer.weight_decay": 5e-4,
        "training.images_per_step": 512,
        "training.epochs": 800,
        "method.projector_layers": 2,
        "method.projector_dim": 2048,
        "method.predictor_hidden_dim": 512,
        "views.evaluation_resize_px": 36,
        "views.evaluation_interpolation": "bilinear",
    },
    "simclr-imagenet-r50-100ep": {
        "views.evaluation_interpolation": "bicubic",
        "method.backbone.zero_init_residual": True,
        "optimizer.name": "lars",
        "optimizer.lars_norm": "decayed-gradient",
        "optimizer.lars_trust_coefficient": 0.001,
        "optimizer.lars_clip": False,
        "optimizer.momentum": 0.9,
        "optimizer.learning_rate_per_256": 0.3,
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_exempts_vectors": True,
        "optimizer.warmup_epochs": 10,
        "optimizer.final_learning_rate": 1e-6,
        "training.images_per_step": 4096,
        "training.epochs": 100,
        "method.temperature": 0.1,
        "method.projector_dim": 128,
        "views.global_views.even.crop_scale": (0.08, 1.0),
        "views.global_views.even.brightness": 0.8,
        "views.global_views.even.hue_turns": 0.2,
        "views.global_views.even.blur_kernel_px": 23,
    },
    "dino-imagenet-vits16-100ep": {
        "optimizer.name": "adamw",
        "optimizer.learning_rate_per_256": 5e-4,
        "optimizer.weight_decay": 0.04,
        "optimizer.final_weight_decay": 0.4,
        "optimizer.decay_exempts_vectors": True,
        "optimizer.warmup_epochs": 10,
        "optimizer.final_learning_rate": 1e-6,
        "optimizer.clip_gradient_norm": 3.0,
        "optimizer.clip_scope": "global",
        "training.images_per_step": 512,
        "views.evaluation_interpolation": "bicubic",
        "method.num_prototypes": 65_536,
        "method.head_hidden_dim": 2048,
        "method.head_bottleneck_dim": 256,
        "method.norm_last_layer": True,
        "method.teacher_temperature": 0.04,
        "method.warmup_teacher_epochs": 0,
        "method.teacher_momentum": 0.996,
        "method.freeze_last_layer_epochs": 1,
        "method.backbone.drop_path": 0.1,
        "views.global_views.even.crop_scale": (0.4, 1.0),
        "views.global_views.even.interpolation": "bicubic",
        "views.global_views.even.blur_probability": 1.0,
        "views.global_views.odd.blur_probability": 0.1,
        "views.global_views.even.solarize_probability": 0.0,
        "views.global_views.odd.solarize_probability": 0.2,
        "views.global_views.even.saturation": 0.2,
        "views.local_views.size_px": 96,
        "views.local_views.even.crop_scale": (0.05, 0.4),
        "views.local_views.even.blur_probability": 0.5,
        "selection.limit": 128,
    },
    "dino-imagenet-vits16-800ep": {
        "training.images_per_step": 1024,
        "training.precision": "float32",
        "optimizer.clip_gradient_norm": None,
        "optimizer.final_learning_rate": 1e-5,
        "method.norm_last_layer": False,
        "method.warmup_teacher_temperature": 0.04,
        "method.teacher_temperature": 0.07,
        "method.warmup_teacher_epochs": 30,
        "views.global_views.even.crop_scale": (0.25, 1.0),
        "views.local_views.even.crop_scale": (0.05, 0.25),
        "selection.num_chosen_local_views": 10,
        "selection.limit": 64,
    },
    "dino-imagenet-r50-100ep": {
        "method.backbone.zero_init_residual": False,
        "views.evaluation_interpolation": "bicubic",
        "optimizer.name": "sgd",
        "optimizer.learning_rate_per_256": 0.03,
        "optimizer.weight_decay": 1e-4,
        "optimizer.final_weight_decay": None,
        "views.global_views.even.crop_scale": (0.14, 1.0),
        "views.local_views.even.crop_scale": (0.05, 0.14),
    },
    "ibot-imagenet-vits16-100ep": {
        "optimizer.clip_scope": "tensor",
        "optimizer.clip_gradient_norm": 3.0,
        "training.images_per_step": 512,
        "views.evaluation_interpolation": "bicubic",
        "method.num_prototypes": 8192,
        "method.norm_last_layer": False,
        "method.teacher_temperature": 0.04,
        "method.warmup_patch_teacher_temperature": 0.04,
        "method.patch_teacher_temperature": 0.07,
        "method.warmup_patch_teacher_epochs": 30,
        "method.class_weight": 1.0,
        "method.patch_weight": 1.0,
        "views.masks.patch_px": 16,
        "views.masks.unmasked_probability": 0.5,
        "views.masks.ratio": (0.1, 0.5),
        "views.global_views.even.crop_scale": (0.14, 1.0),
        "views.local_views.even.crop_scale": (0.05, 0.4),
        "selection.every": 3,
    },
    "dinov2-imagenet-vitl14": {
        "method.backbone.name": "vit_large_patch14_reg4_dinov2",
        "method.backbone.drop_path": 0.3,
        "method.num_prototypes": 131_072,
        "method.head_bottleneck_dim": 384,
        "method.num_patch_prototypes": 131_072,
        "method.patch_head_bottleneck_dim": 256,
        "method.head_hidden_dim": 2048,
        "method.koleo_weight": 0.1,
        "method.teacher_temperature": 0.07,
        "method.warmup_teacher_temperature": 0.04,
        "method.warmup_teacher_epochs": 30,
        "method.patch_teacher_temperature": 0.07,
        "method.teacher_momentum": 0.992,
        "method.freeze_last_layer_epochs": 1,
        "views.masks.ratio": (0.1, 0.5),
        "views.masks.min_block_patches": 4,
        "views.global_views.even.crop_scale": (0.32, 1.0),
        "views.local_views.even.crop_scale": (0.05, 0.32),
        "views.local_views.size_px": 98,
        "optimizer.learning_rate_per_256": 1e-3,
        "optimizer.layer_decay": 0.9,
        "optimizer.patch_embedding_rate": 0.2,
        "optimizer.final_weight_decay": 0.4,
        "optimizer.clip_gradient_norm": 3.0,
        "training.epochs": 100,
    },
}


@pytest.mark.parametrize("name", TABLE)
def test_recipe_has_the_settings_of_its_source(name: str) -> None:
    config = get_recipe(name)
    for path, expected in TABLE[name].items():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        assert value == expected, path


@pytest.mark.parametrize("name", RECIPES)
def test_every_rule_is_one_switch_on_every_recipe(name: str) -> None:
    config = get_recipe(name)
    for rule in get_args(Rule):
        selection = dataclasses.replace(config.selection, rule=rule)
        arm = dataclasses.replace(config, selection=selection)
        assert (hard_step(arm.selection).num_views == 2) == (rule in ("first", "predicted"))


def test_view_counts_are_those_of_the_paper() -> None:
    counts = {}
    for name in IMAGENET:
        config = get_recipe(name)
        candidates = hard_step(config.selection).candidates(config.views)
        counts[name] = (
            candidates.num_views,
            candidates.num_local_views,
            candidates.num_chosen_local_views,
            candidates.alternating,
        )
    assert counts == {
        "simsiam-imagenet-r50-100ep": (4, 0, 0, False),
        "simclr-imagenet-r50-100ep": (4, 0, 0, False),
        "dino-imagenet-vits16-100ep": (4, 16, 8, True),
        "dino-imagenet-vits16-800ep": (4, 16, 10, True),
        "dino-imagenet-r50-100ep": (4, 16, 8, True),
        "ibot-imagenet-vits16-100ep": (4, 4, 2, True),
        "dinov2-imagenet-vits14": (4, 8, 8, True),
        "dinov2-imagenet-vitl14": (4, 8, 8, True),
    }


def _small(name: str, images: int) -> RunConfig:
    config = get_recipe(name)
    return dataclasses.replace(
        config, training=dataclasses.replace(config.training, images_per_step=images, precision="float32")
    )


def _process_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _noise(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=dtype)


def _train_one_step(names: list[str], results: Any) -> None:
    """In a process of its own: a real step of each recipe; loss, and how far resident memory rose.

    The optimizer's state is made before, by an update with gradients of zero, so that the step is one like any other.
    """
    torch.set_num_threads(2)
    for name in names:
        config = _small(name, 2)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _process_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        trainee = build_trainee(config, World(), torch.device("cpu"), None)
        trainee.method.train()
        batch = made_up_batch(config, _noise)
        for parameter in trainee.method.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trainee.optimizer.step()
        loss = float(train_step(trainee, batch, config, hard_step(config.selection)).loss)
        finite = all(bool(p.isfinite().all()) for p in trainee.method.parameters())
        results.put((name, loss, finite, _process_bytes("VmHWM") - before))
        del trainee, batch


CHEAPEST = "simsiam-imagenet-r50-100ep"
LARGEST = "dinov2-imagenet-vitl14"


@pytest.mark.parametrize(
    "names",
    [[CHEAPEST], pytest.param([name for name in IMAGENET if name not in (CHEAPEST, LARGEST)], marks=pytest.mark.long)],
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the process's memory from Linux's /proc")
def test_imagenet_recipes_train_at_full_size_in_the_memory_that_is_estimated(names: list[str]) -> None:
    """Real network, heads and view sizes; two images. The estimate has no constant of any recipe."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_train_one_step, args=(names, results))
    process.start()
    estimates = {name: estimate_memory(_small(name, 2)).peak for name in names}
    measured = {}
    for _ in names:
        name, loss, finite, grew = results.get()
        assert math.isfinite(loss), name
        assert finite, name
        measured[name] = grew
    process.join()
    for name, estimate in estimates.items():
        assert abs(estimate / measured[name] - 1.0) < 0.35, (name, estimate, measured[name])


@pytest.mark.long
def test_step_of_the_largest_recipe_goes_through_without_its_memory() -> None:
    """ViT-L/14: weights of student and teacher, gradients and AdamW's two moments in float32."""
    memory = estimate_memory(_small(LARGEST, 2))
    num_trained = 304e6 + 2 * 2048 * (1024 + 2048) + 2048 * (384 + 256)
    prototypes = 131_072 * (384 + 256)
    assert memory.weights == pytest.approx(2 * 4 * (num_trained + prototypes), rel=0.02)
    assert memory.gradients == pytest.approx(4 * (num_trained + prototypes), rel=0.02)
    assert memory.optimizer_state == pytest.approx(2 * memory.gradients, rel=0.02)
    assert memory.peak > memory.weights + memory.gradients + memory.optimizer_state


def test_operation_counts_are_those_of_the_model() -> None:
    """Forward 1, backward 2, a local view of ViT-S 0.176 of a global one: reference figures of a hard step.

    A random step of DINO is 2 (teacher) + 3 * (2 + 8 * 0.176) = 12.2 forward passes, of which reuse saves the teacher's 2.
    """
    expected = {"simsiam-imagenet-r50-100ep": (1.67, 1.67), "dino-imagenet-vits16-100ep": (1.88, 1.88 - 2 / 12.2)}
    for name, (ratio, ratio_with_reuse) in expected.items():
        config = _small(name, 2)
        assert count_operations(config).ratio == pytest.approx(ratio_with_reuse, abs=0.015), name
        config = dataclasses.replace(config, selection=dataclasses.replace(config.selection, reuse_teacher=False))
        assert count_operations(config).ratio == pytest.approx(ratio, abs=0.015), name
    # With the student's rows reused, a step forwards all candidates once, and runs the backward of a random step. Of two
    # blocks only, for speed, so DINO's heads count for more.
    expected_with_rows = {
        "simclr-imagenet-r50-100ep": (4 + 2 * 2) / 6,
        "dino-imagenet-vits16-100ep": (4 + 4 + 16 * 0.176 + 2 * (2 + 8 * 0.176)) / 12.2,
    }
    for name, ratio in expected_with_rows.items():
        config = _small(name, 2)
        backbone = dataclasses.replace(config.method.backbone, name="vit_small_patch16_224", depth=2)
        config = dataclasses.replace(
            config,
            method=dataclasses.replace(config.method, backbone=backbone),
            selection=dataclasses.replace(config.selection, reuse_student=True),
            training=dataclasses.replace(config.training, compile=False, accumulation_steps=1),
        )
        assert count_operations(config).ratio == pytest.approx(ratio, abs=0.03), name
    half = get_recipe("simsiam-imagenet-r50-100ep")
    half = dataclasses.replace(half, selection=dataclasses.replace(half.selection, scoring_resolution_px=112))
    half = dataclasses.replace(half, training=dataclasses.replace(half.training, images_per_step=2))
    assert count_operations(half).ratio == pytest.approx(1.17, abs=0.015)
