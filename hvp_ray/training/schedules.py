"""Schedules as functions of the step: nothing to save, nothing to restore."""

import math

from hvp_ray.config import OptimizerConfig
from hvp_ray.methods.method import StepPosition


def learning_rate_at(config: OptimizerConfig, position: StepPosition, *, images_per_step: int) -> float:
    """Return the learning rate of a step.

    After a linear warm-up from 0, rate = final + (base - final) x (1 + cos(pi t)) / 2. Here base = learning_rate_per_256 x
    images_per_step / 256, and t in [0, 1) is the fraction done of the steps after the warm-up. With cosine-per-epoch, t
    changes only at the start of an epoch, as in SimSiam's code. The last step of the warm-up has the base rate.
    """
    base = base_learning_rate(config, images_per_step)
    warmup_steps = min(round(config.warmup_epochs * position.steps_per_epoch), position.num_steps)
    if position.step < warmup_steps:
        return base * position.step / max(1, warmup_steps - 1)
    done, length = position.step - warmup_steps, position.num_steps - warmup_steps
    if config.schedule == "cosine-per-epoch":
        done = position.epoch
        length = math.ceil(position.num_steps / position.steps_per_epoch)
    return cosine(base, config.final_learning_rate, done / length)


def weight_decay_at(config: OptimizerConfig, position: StepPosition) -> float:
    """Return the weight decay of a step: constant, or on a cosine to `final_weight_decay`."""
    if config.final_weight_decay is None:
        return config.weight_decay
    return cosine(config.weight_decay, config.final_weight_decay, position.step / position.num_steps)


def cosine(start: float, end: float, done: float) -> float:
    """Return the value on half a cosine from `start` (done = 0) to `end` (done = 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def base_learning_rate(config: OptimizerConfig, images_per_step: int) -> float:
    """Return the rate at the start of the cosine: linear in the images per step."""
    return config.learning_rate_per_256 * images_per_step / 256
