"""A trainer's device holds two batches, and both are counted."""

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch

from hvp_ray.config import with_settings
from hvp_ray.costs.imaginary import made_up_batch
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.costs.prefetch import batch_bytes
from hvp_ray.distributed.world import World
from hvp_ray.launch import local
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import KeptViews, hard_step
from hvp_ray.stream.batches import InlineBatches
from hvp_ray.stream.device import BATCHES_ON_DEVICE, DeviceBatch
from hvp_ray.training.pixel_views import PixelViews
from hvp_ray.training.step import score_candidates, train_step
from hvp_ray.training.trainee import build_trainee, build_untrained_method
from tests.helpers import tiny_config


@pytest.mark.parametrize("recipe", ["simsiam-digits", "dino-digits"])
def test_batch_in_use_and_the_next_are_counted(recipe: str) -> None:
    config = get_recipe(recipe)
    estimate = estimate_memory(config)
    assert estimate.batches == BATCHES_ON_DEVICE * batch_bytes(config) == 2 * batch_bytes(config)
    assert estimate.scoring_peak > estimate.weights + estimate.optimizer_state + estimate.batches


def test_estimate_has_what_is_kept_of_the_students_rows(tmp_path: Path) -> None:
    """Reuse adds to the peak of scoring what a real step keeps, less what a scoring pass frees on its way."""
    method = get_recipe("ibot-digits").method
    small = dataclasses.replace(method, backbone=dataclasses.replace(method.backbone, depth=1, drop_path=0.0))
    config = dataclasses.replace(tiny_config(str(tmp_path), recipe="ibot-digits"), method=small)
    reusing = dataclasses.replace(config, selection=dataclasses.replace(config.selection, reuse_student=True))
    trainee = build_trainee(reusing, World(), torch.device("cpu"), None)
    pixels = PixelViews.of(made_up_batch(reusing, torch.zeros))
    candidates = hard_step(config.selection).candidates(config.views)
    reusable = score_candidates(trainee, pixels, candidates, reusing, 0).reusable
    kept = [of_views.kept for of_views in reusable.values() if isinstance(of_views, KeptViews)]
    kept_bytes = sum(value.untyped_storage().nbytes() for of_size in kept for value in of_size._values)
    assert len(kept) == 2
    plain, with_rows = estimate_memory(config), estimate_memory(reusing)
    assert 0.8 * kept_bytes < with_rows.scoring_peak - plain.scoring_peak < 1.05 * kept_bytes
    assert with_rows.training_peak <= plain.training_peak


def test_scoring_as_a_cuda_graph_keeps_its_memory_during_training() -> None:
    """By hand: what scoring has live at its peak, besides what was live before it, is added to the peak of training."""
    config = get_recipe("simclr-digits")
    plain = estimate_memory(config)
    graphs = estimate_memory(with_settings(config, {"training.compile": True, "training.cuda_graphs": True}))
    before = plain.weights + plain.optimizer_state + plain.batches
    assert graphs.peak == plain.training_peak + plain.scoring_peak - before
    assert (graphs.scoring_peak, graphs.training_peak) == (plain.scoring_peak, plain.training_peak)


def test_shards_keep_their_part_and_gather_blocks() -> None:
    """By hand: what is spared is (1 - 1/R) of the kept; gathered are two blocks, and all that lies outside the blocks."""
    config = get_recipe("dinov2-digits")
    whole, two, many = (
        estimate_memory(with_settings(config, settings))
        for settings in (
            {},
            *(
                {"cluster.sharding": "fsdp", "cluster.num_trainers": n, "training.images_per_step": 32 * n}
                for n in (2, 8)
            ),
        )
    )
    method = build_untrained_method(config)
    block = 4 * sum(p.numel() for p in method.backbone.blocks[0].parameters())
    parameters = 4 * sum(p.numel() for p in method.parameters())
    outside = parameters - 2 * len(method.backbone.blocks) * block
    assert (two.weights, many.weights) == (whole.weights // 2, whole.weights // 8)
    assert (two.optimizer_state, two.gradients) == (whole.optimizer_state // 2, whole.gradients // 2)
    spared = whole.weights - two.weights + whole.optimizer_state - two.optimizer_state
    assert two.scoring_peak == whole.scoring_peak - spared + outside + 2 * block
    assert many.training_peak < two.training_peak


def test_steps_without_content_leave_nothing_to_real_ones(tmp_path: Path) -> None:
    for recipe in ("simclr-digits", "dino-digits"):
        config = tiny_config(str(tmp_path), recipe=recipe)
        estimate_memory(config)
        trainee = build_trainee(config, World(), torch.device("cpu"), None)
        batch = made_up_batch(config, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
        metrics = train_step(trainee, batch, config, hard_step(config.selection))
        assert type(metrics.loss) is torch.Tensor
        assert metrics.loss.isfinite()


def test_trainer_drops_a_batch_before_it_takes_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels: list[weakref.ref[torch.Tensor]] = []

    class WatchedBatches(InlineBatches):
        def next_batch(self) -> DeviceBatch:
            assert all(earlier() is None for earlier in pixels)
            batch = super().next_batch()
            pixels.append(weakref.ref(batch.global_pixels))
            return batch

    monkeypatch.setattr(local, "InlineBatches", WatchedBatches)
    config = tiny_config(str(tmp_path), training={"epochs": 1}, tracking={"knn_images": 0})
    assert local.pretrain_in_process(config) is not None
    assert len(pixels) == 10
