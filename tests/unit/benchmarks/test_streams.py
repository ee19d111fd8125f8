"""What `benchmarks/stream.py` computes from what it saw. No test of speed: a benchmark is not a test."""

import math

import pytest

from benchmarks.streams.cpu_time import cpu_spent
from benchmarks.streams.timed_loop import LoopTimes, run_timed


def _times(waits: list[float]) -> LoopTimes:
    return LoopTimes(
        images_per_step=10, steps_per_epoch=3, step_seconds=1.0, waits=waits, seconds=len(waits) + sum(waits[1:])
    )


def test_wait_of_the_first_batch_is_apart() -> None:
    times = _times([100.0, 0.0, 1.0])
    assert times.wait_fraction == pytest.approx(1.0 / 4.0)
    assert times.images_per_second == pytest.approx(30.0 / 4.0)


def test_waits_are_told_apart_by_where_they_were() -> None:
    times = _times([100.0, 1.0, 3.0, 5.0, 0.0, 0.5, 7.0, 0.0, 0.5])
    assert times.first_epoch_wait_seconds == pytest.approx(2.0)
    assert times.boundary_wait_seconds == pytest.approx(6.0)
    assert times.later_wait_seconds == pytest.approx(0.25)


def test_one_epoch_has_no_boundary() -> None:
    times = _times([1.0, 1.0, 1.0])
    assert math.isnan(times.boundary_wait_seconds)
    assert math.isnan(times.later_wait_seconds)


def test_a_timed_loop_takes_every_batch_once_and_in_order() -> None:
    taken: list[int] = []
    times = run_timed(lambda: taken.append(len(taken)), steps=4, step_seconds=0.0, images_per_step=1, steps_per_epoch=2)
    assert taken == [0, 1, 2, 3]
    assert len(times.waits) == 4
    assert times.seconds > 0.0


def test_cpu_time_is_told_apart_by_process() -> None:
    before = {1: ("python", 5.0), 2: ("ray::ViewWorker", 1.0), 3: ("raylet", 2.0), 4: ("gcs_server", 7.0)}
    after = {
        1: ("python", 5.5),
        2: ("ray::ViewWorker", 4.0),
        3: ("raylet", 2.25),
        4: ("gcs_server", 8.0),
        5: ("python", 2.0),
    }
    spent = cpu_spent(before, after, workers={2, 5}, consumer=1)
    assert (spent.workers, spent.consumer, spent.raylets, spent.rest) == (5.0, 0.5, 0.25, 1.0)
    assert spent.outside_rest == 5.75
