"""A trainer's device holds two batches, and both are counted."""

import weakref
from pathlib import Path

import pytest
import torch

from hvp_ray.costs.memory import estimate_memory
from hvp_ray.costs.prefetch import batch_bytes
from hvp_ray.launch import local
from hvp_ray.recipes import get_recipe
from hvp_ray.stream.batches import InlineBatches
from hvp_ray.stream.device import BATCHES_ON_DEVICE, DeviceBatch
from tests.helpers import tiny_config


@pytest.mark.parametrize("recipe", ["simsiam-digits", "dino-digits"])
def test_batch_in_use_and_the_next_are_counted(recipe: str) -> None:
    config = get_recipe(recipe)
    estimate = estimate_memory(config)
    assert estimate.batches == BATCHES_ON_DEVICE * batch_bytes(config) == 2 * batch_bytes(config)
    assert estimate.scoring_peak > estimate.weights + estimate.optimizer_state + estimate.batches


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
