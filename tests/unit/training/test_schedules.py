"""Schedules: closed forms, and only the step counts."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from hvp_ray.config import OptimizerConfig
from hvp_ray.methods.method import StepPosition
from hvp_ray.methods.self_distillation import teacher_momentum_at, temperature_at
from hvp_ray.training.schedules import learning_rate_at, weight_decay_at


def _rates(schedule: str, num_steps: int = 40, steps_per_epoch: int = 10, **options: float) -> list[float]:
    config = OptimizerConfig(learning_rate_per_256=0.05, schedule=schedule, **options)
    positions = [StepPosition(step=s, num_steps=num_steps, steps_per_epoch=steps_per_epoch) for s in range(num_steps)]
    return [learning_rate_at(config, position, images_per_step=512) for position in positions]


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


def test_warm_up_and_cosine_are_the_references_array() -> None:
    """DINO's cosine_scheduler: linspace(0, base, warm-up) including its end, then a cosine to the final value."""
    warmup, total, base, final = 20, 100, 0.1, 0.004
    expected = np.concatenate(
        [
            np.linspace(0.0, base, warmup),
            final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup))),
        ]
    )
    rates = _rates("cosine-per-step", num_steps=total, warmup_epochs=2, final_learning_rate=final)
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_weight_decay_is_constant_or_a_cosine_between_its_ends() -> None:
    config = OptimizerConfig(learning_rate_per_256=1.0, weight_decay=0.04)
    cosine = dataclasses.replace(config, final_weight_decay=0.4)
    at = {step: StepPosition(step=step, num_steps=100, steps_per_epoch=10) for step in (0, 50, 99)}
    assert [weight_decay_at(config, position) for position in at.values()] == [0.04] * 3
    assert weight_decay_at(cosine, at[0]) == pytest.approx(0.04)
    assert weight_decay_at(cosine, at[50]) == pytest.approx(0.22)
    assert 0.399 < weight_decay_at(cosine, at[99]) < 0.4


def test_teacher_follows_its_schedules() -> None:
    assert teacher_momentum_at(0.996, 0, 100) == pytest.approx(0.996)
    assert teacher_momentum_at(0.996, 50, 100) == pytest.approx(0.998)
    assert teacher_momentum_at(0.996, 99, 100) < 1.0
    temperatures = [temperature_at(0.04, 0.07, 4, epoch) for epoch in range(6)]
    np.testing.assert_allclose(temperatures, [*np.linspace(0.04, 0.07, 4), 0.07, 0.07])
    assert temperature_at(0.04, 0.07, 0, 0) == 0.07
