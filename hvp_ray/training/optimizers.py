"""The optimizer of a method, with the parameters whose rate stays constant in a group of their own."""

import torch
from torch import nn

from hvp_ray.config import OptimizerConfig
from hvp_ray.training.schedules import base_learning_rate

CONSTANT_RATE_GROUP = 1
"""Index of the parameter group that keeps the initial learning rate."""


def build_optimizer(method: nn.Module, config: OptimizerConfig, *, images_per_step: int) -> torch.optim.Optimizer:
    """SGD with momentum; group 0 follows the schedule, group 1 keeps the initial rate (may be empty)."""
    constant: list[nn.Parameter] = method.constant_rate_parameters() if config.constant_predictor_rate else []  # type: ignore[operator]
    constant_ids = {id(parameter) for parameter in constant}
    scheduled = [parameter for parameter in method.parameters() if id(parameter) not in constant_ids]
    groups = [{"params": scheduled}, {"params": constant}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=base_learning_rate(config, images_per_step),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the scheduled group."""
    optimizer.param_groups[0]["lr"] = rate
