"""Bytes and numbers of prefetched batches."""

from hvp_ray.costs.prefetch import (
    batch_bytes,
    batches_for_workers,
    batches_that_fit,
    prefetch_bytes,
    step_bytes,
)
from hvp_ray.data.dataset import open_dataset
from hvp_ray.stream.reading import read_sample
from tests.helpers import tiny_config


def test_decoded_pixels_take_room_beside_the_views() -> None:
    views, pixels = (tiny_config("x", cluster={"ship": ship, "num_trainers": 2}) for ship in ("views", "pixels"))
    dataset = open_dataset(views.data)
    assert step_bytes(views, dataset) == 2 * batch_bytes(views)
    assert step_bytes(pixels, dataset) == 2 * (batch_bytes(views) + 8 * 32 * 32 * 3)
    assert prefetch_bytes(3, 10) == 40


def test_batches_keep_all_workers_busy_and_fit_the_usable_part_of_the_store() -> None:
    two = tiny_config("x", cluster={"num_trainers": 2}).cluster
    assert batches_for_workers(two, 1) == 4
    assert batches_for_workers(two, 16) == 10  # 16 / 2 + 2
    pixels = tiny_config("x", cluster={"ship": "pixels", "finishers_per_trainer": 3}).cluster
    assert batches_for_workers(pixels, 16) == 21
    assert batches_that_fit(10.0, 1) == 6  # 7 steps are 70 % of the store, and one of them is in use


def test_sample_is_spread_over_the_images_that_are_trained_on() -> None:
    dataset = open_dataset(tiny_config("x").data)
    ids = dataset.training_ids
    spread = [int(ids[0]), int(ids[-1]), int(ids[(len(ids) - 1) // 2])]
    assert list(read_sample(dataset.source, ids, 3)) == dataset.source.read(spread)
