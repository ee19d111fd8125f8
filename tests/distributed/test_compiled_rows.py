"""Compiled steps that reuse rows, in a process that checks no types at run time: the compiler cannot trace the checks."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch

from hvp_ray.costs.imaginary import made_up_batch
from hvp_ray.distributed.world import World
from hvp_ray.methods.method import StepPosition
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import hard_step
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import build_trainee_of, build_untrained_method
from tests.distributed.processes import run_ranks
from tests.helpers import tiny_config

pytestmark = pytest.mark.distributed

VIT = dataclasses.replace(get_recipe("ibot-digits").method.backbone, dim=16, depth=1, num_heads=2, drop_path=0.0)


def _two_steps(_rank: int, _num_ranks: int, recipe: str, *, compiled: bool) -> dict[str, Any]:
    """Return the chosen views, losses and weights of two steps; the compiler captures graphs and keeps torch's kernels."""
    config = tiny_config(
        "unused",
        recipe=recipe,
        selection={"reuse_student": compiled},
        training={"compile": compiled},
        method={"backbone": VIT},
    )
    if config.views.local_views is not None:
        local = dataclasses.replace(config.views.local_views, size_px=4)
        config = dataclasses.replace(config, views=dataclasses.replace(config.views, local_views=local))
    torch.manual_seed(0)
    batch = made_up_batch(config, lambda shape, dtype: torch.randint(0, 256, shape, dtype=dtype))
    metrics = []
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        trainee = build_trainee_of(build_untrained_method(config), config, World(), torch.device("cpu"))
        trainee.method.train()
        for step in range(2):
            trainee.method.begin_step(StepPosition(step=step, num_steps=2, steps_per_epoch=2))
            metrics.append(train_step(trainee, batch, config, hard_step(config.selection)))
    return {
        "views": [of_step.selection.view_indices for of_step in metrics],
        "losses": [of_step.loss for of_step in metrics],
        "encoder": dict(trainee.method.backbone.named_buffers()) | dict(trainee.method.backbone.named_parameters()),
    }


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["simclr-digits", "dino-digits", "ibot-digits"])
def test_compiled_steps_that_reuse_rows_train_as_others_do(recipe: str) -> None:
    eager, compiled = (run_ranks(functools.partial(_two_steps, compiled=how), 1, recipe)[0] for how in (False, True))
    assert all(torch.equal(*views) for views in zip(eager["views"], compiled["views"], strict=True))
    torch.testing.assert_close(compiled["losses"], eager["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled["encoder"], eager["encoder"], rtol=1e-4, atol=1e-4)
