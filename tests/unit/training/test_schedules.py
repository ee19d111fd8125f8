"""Schedules: closed forms, and only the step counts."""

import itertools
import math

import pytest

from hvp_ray.config import OptimizerConfig
from hvp_ray.training.schedules import learning_rate_at


def _rates(schedule: str, num_steps: int = 40, steps_per_epoch: int = 10) -> list[float]:
    config = OptimizerConfig(learning_rate_per_256=0.05, schedule=schedule)
    return [
        learning_rate_at(config, s, num_steps=num_steps, steps_per_epoch=steps_per_epoch, images_per_step=512)
        for s in range(num_steps)
    ]


def test_cosine_per_epoch_is_that_of_simsiam() -> None:
    rates = _rates("cosine-per-epoch")
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * (step // 10) / 4)))
    assert len(set(rates)) == 4


def test_cosine_per_step_falls_every_step_to_nearly_zero() -> None:
    rates = _rates("cosine-per-step")
    assert rates[0] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[-1] < 0.001


def test_partial_last_epoch_counts_as_one() -> None:
    assert _rates("cosine-per-epoch", num_steps=25)[20] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 2 / 3)))
