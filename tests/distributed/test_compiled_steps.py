"""Compiled steps without the breaks that make a GPU wait, in a process that checks no types at run time.

The compiler captures graphs and keeps torch's kernels, so this shows nothing about speed.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from hvp_ray.config import RunConfig
from hvp_ray.costs.imaginary import made_up_batch
from hvp_ray.distributed.world import World
from hvp_ray.methods.method import StepPosition
from hvp_ray.selection import selection_at
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import Trainee, build_trainee_of, build_untrained_method
from tests.distributed.processes import run_ranks
from tests.helpers import tiny_config

pytestmark = pytest.mark.distributed

NUM_STEPS = 6


def _train(config: RunConfig, batch: DeviceBatch) -> Iterator[Trainee]:
    """Train some steps, compiled by a backend that keeps torch's kernels; yield the trainee after each."""
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager")):
        trainee = build_trainee_of(build_untrained_method(config), config, World(), torch.device("cpu"))
        trainee.method.train()
        for step in range(NUM_STEPS):
            trainee.method.begin_step(StepPosition(step=step, num_steps=NUM_STEPS, steps_per_epoch=2))
            train_step(trainee, batch, config, selection_at(config.selection, step, NUM_STEPS))
            yield trainee


def _graphs(_rank: int, _num_ranks: int, recipe: str, selection: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Return the number of graphs after each of some steps of several epochs, and the reasons of graph breaks."""
    from torch._dynamo.utils import counters

    config = tiny_config("unused", recipe=recipe, selection=selection, training={"compile": True})
    batch = made_up_batch(config, lambda shape, dtype: torch.randint(0, 256, shape, dtype=dtype))
    torch.compiler.reset()
    counters.clear()
    graphs = [counters["stats"]["unique_graphs"] for _ in _train(config, batch)]
    return graphs, list(counters["graph_break"])


RECIPES = ("simsiam-digits", "simclr-digits", "dino-digits", "ibot-digits", "dinov2-digits")


@pytest.mark.parametrize("recipe", RECIPES)
def test_hard_steps_are_a_graph_for_scoring_and_one_for_training(recipe: str) -> None:
    assert run_ranks(_graphs, 1, recipe, {})[0] == ([2] * NUM_STEPS, [])


def _weights(_rank: int, _num_ranks: int, recipe: str, training: dict[str, Any]) -> list[torch.Tensor]:
    """Return the weights after some steps."""
    config = tiny_config("unused", recipe=recipe, training={"compile": True} | training)
    batch = made_up_batch(config, lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype))
    *_, trainee = _train(config, batch)
    return [values.clone() for values in trainee.method.state_dict().values()]


@pytest.mark.parametrize("recipe", ["simclr-digits", "ibot-digits"])
def test_copies_of_scores_change_no_weight(recipe: str) -> None:
    """With `training.cuda_graphs` a step works on copies, in parts too; replaying itself needs a GPU (tests/gpu)."""
    parts = {"accumulation_steps": 2}
    expected, copied = (
        run_ranks(_weights, 1, recipe, training)[0] for training in (parts, {"cuda_graphs": True} | parts)
    )
    assert all(map(torch.equal, copied, expected))


@pytest.mark.parametrize("recipe", ["ibot-digits", "dinov2-digits"])
def test_steps_that_reuse_rows_break_only_there_and_compile_nothing_later(recipe: str) -> None:
    graphs, breaks = run_ranks(_graphs, 1, recipe, {"reuse_student": True})[0]
    assert len(set(graphs)) == 1
    assert len(breaks) == 1
    assert "Method._forward_all_rows" in breaks[0]


@pytest.mark.parametrize(
    ("recipe", "selection"),
    [
        *((recipe, {"rule": "first"}) for recipe in RECIPES),
        ("simclr-digits", {"rule": "all_pairs", "weighting": "softmax"}),
    ],
)
def test_steps_without_scoring_are_one_graph(recipe: str, selection: dict[str, Any]) -> None:
    assert run_ranks(_graphs, 1, recipe, selection)[0] == ([1] * NUM_STEPS, [])
