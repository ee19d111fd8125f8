"""Schedules as functions of the step: nothing to save, nothing to restore."""

import math

from hvp_ray.config import OptimizerConfig


def learning_rate_at(
    config: OptimizerConfig, step: int, *, num_steps: int, steps_per_epoch: int, images_per_step: int
) -> float:
    """Return the learning rate of step `step` (from 0).

    rate = base x images_per_step / 256 x (1 + cos(pi t)) / 2, where t in [0, 1) is the share of the run that lies
    behind; with cosine-per-epoch it moves at the start of epochs only, as in the authors' code.
    """
    position, length = step, num_steps
    if config.schedule == "cosine-per-epoch":
        position = step // steps_per_epoch
        length = math.ceil(num_steps / steps_per_epoch)
    return base_learning_rate(config, images_per_step) * 0.5 * (1.0 + math.cos(math.pi * position / length))


def base_learning_rate(config: OptimizerConfig, images_per_step: int) -> float:
    """Return the rate at the start: linear in the images per step."""
    return config.learning_rate_per_256 * images_per_step / 256
