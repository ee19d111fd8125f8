"""Batches that are rendered in the trainer's process, on demand or one ahead."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import DataError
from hvp_ray.records import BatchRequest
from hvp_ray.runs.rank import build_order
from hvp_ray.stream.batches import InlineBatches, RequestOf, requests_of_rank
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.render_batch import RenderContext, build_render_context
from tests.helpers import tiny_config

CPU = torch.device("cpu")
NUM_STEPS = 5


def _context_and_requests(folder: Path) -> tuple[RenderContext, RequestOf]:
    config = tiny_config(str(folder))
    dataset = open_dataset(config.data)
    order = build_order(config, dataset)
    requests = requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})
    return build_render_context(config, dataset, "cpu"), requests


@pytest.fixture
def context_and_requests(tmp_path: Path) -> tuple[RenderContext, RequestOf]:
    return _context_and_requests(tmp_path)


def test_batches_rendered_ahead_equal_those_on_demand(tmp_path: Path) -> None:
    context, requests = _context_and_requests(tmp_path)
    on_demand = InlineBatches(context, requests, first_step=2, copy_to_device=CopyToDevice(CPU))
    expected = [on_demand.next_batch() for _ in range(2, NUM_STEPS)]

    ahead = InlineBatches(context, requests, first_step=2, copy_to_device=CopyToDevice(CPU), end_step=NUM_STEPS)
    batches = [ahead.next_batch() for _ in range(2, NUM_STEPS)]
    ahead.close()

    assert [batch.step for batch in batches] == list(range(2, NUM_STEPS))
    for batch, before in zip(batches, expected, strict=True):  # after later ones were rendered
        np.testing.assert_array_equal(batch.global_pixels, before.global_pixels)
    assert ahead.stats.num_batches == NUM_STEPS - 2


def test_one_batch_is_rendered_ahead_and_none_after_the_last(
    context_and_requests: tuple[RenderContext, RequestOf],
) -> None:
    context, requests = context_and_requests
    requested: list[int] = []
    was_requested = threading.Condition()

    def note(step: int) -> BatchRequest:
        with was_requested:
            requested.append(step)
            was_requested.notify()
        return requests(step)

    def wait_for(steps: list[int]) -> None:
        with was_requested:
            assert was_requested.wait_for(lambda: requested == steps, timeout=60)

    stream = InlineBatches(context, note, first_step=0, copy_to_device=CopyToDevice(CPU), end_step=3)
    wait_for([0])
    for taken in range(3):
        stream.next_batch()
        wait_for(list(range(min(taken + 2, 3))))
    stream.close()
    assert requested == [0, 1, 2]


def test_an_error_of_the_batch_ahead_comes_with_its_step(
    context_and_requests: tuple[RenderContext, RequestOf],
) -> None:
    context, requests = context_and_requests

    def fail_at_1(step: int) -> BatchRequest:
        if step == 1:
            raise DataError("the disk is gone")
        return requests(step)

    stream = InlineBatches(context, fail_at_1, first_step=0, copy_to_device=CopyToDevice(CPU), end_step=NUM_STEPS)
    assert stream.next_batch().step == 0
    with pytest.raises(DataError, match="the disk is gone"):
        stream.next_batch()
    stream.close()
