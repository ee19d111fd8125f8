"""What a step of each arm costs, measured before the comparison starts: the accounting of "equal compute".

All arms' steps are run by turns in one process, on real batches. On a CPU the clock is the process's CPU time and the
least disturbed turn counts (neighbours on a shared core only ever make a step slower); on a GPU it is the device's own,
and the median counts. Rendering is measured beside
it, and is not part of the compute: in production it is done by other machines.

One trainer runs, without torch.compile, whatever the runs use: see docs/reference_differences.md.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hvp_ray.comparison.arms import Arm
from hvp_ray.config import RunConfig
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.costs.operations import count_operations
from hvp_ray.data.dataset import Dataset
from hvp_ray.distributed.world import World
from hvp_ray.local_cache import with_local_weights
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import RULES, candidates_of, needs_scores_at
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import build_render_context, render_batch
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import build_trainee


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Cost of one arm, mean over its steps (an arm with a hard step every third step has two kinds)."""

    step_seconds: float
    """Trainer's step: CPU seconds of all threads, or seconds of the GPU."""
    render_cpu_seconds: float
    """Rendering the views of a step's images, decoding included, CPU seconds."""
    views_per_image: float
    forwards_per_image: float
    """Global views forwarded per image: scoring and training. (A training step forwards two.)"""
    counted_operations: float
    """Floating-point operations of a step on one trainer, counted."""
    memory_bytes: float
    """Estimated peak of a trainer; see `costs/memory.py`."""

    def scaled(self, factor: float) -> "StepCost":
        """Return the cost with its seconds brought to the clock of another measurement."""
        return dataclasses.replace(
            self, step_seconds=factor * self.step_seconds, render_cpu_seconds=factor * self.render_cpu_seconds
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


def measure_step_costs(
    base: RunConfig,
    arms: Sequence[Arm],
    dataset: Dataset,
    *,
    device: torch.device,
    repeats: int = 15,
    at_least_seconds: float = 20.0,
) -> dict[str, StepCost]:
    """Measure and count the cost of a step of every arm.

    Args:
        base: recipe and overrides; one trainer's share of a step is run.
        arms: what is measured.
        dataset: of `base`.
        device: where trainers run.
        repeats: turns at least.
        at_least_seconds: of all measured steps together. Where a step is short, more turns are made: on a shared core hardly
            one of 15 is undisturbed, and two measurements of the same steps gave ratios of 1.13 and 1.48.
    """
    alone = dataclasses.replace(
        base,
        training=dataclasses.replace(base.training, images_per_step=base.images_per_rank, compile=False),
        cluster=dataclasses.replace(base.cluster, num_trainers=1),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(base.training.torch_threads)
    try:
        trainee = build_trainee(with_local_weights(alone), World(), device, None)
        trainee.method.train()
        kinds: dict[str, tuple[RunConfig, DeviceBatch, float]] = {}
        for arm in arms:
            config = arm.configure(alone)
            for is_hard in (True, False):
                if is_hard or config.selection.every > 1:
                    kinds[f"{arm.name}/{is_hard}"] = _prepare(config, dataset, device, is_hard=is_hard)
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in itertools.count():
            if turn > repeats and sum(map(sum, seconds.values())) >= at_least_seconds:
                break
            for name, (config, batch, _) in kinds.items():
                spent = _seconds_of_step(trainee, batch, config, device)
                if turn:  # the first one makes memory, kernels and the optimizer's state
                    seconds[name].append(spent)
    finally:
        torch.set_num_threads(threads)
    typical = statistics.median if device.type == "cuda" else min
    costs = {}
    for arm in arms:
        config = arm.configure(alone)
        every = config.selection.every
        shares = {f"{arm.name}/True": 1 / every} | ({f"{arm.name}/False": 1 - 1 / every} if every > 1 else {})
        operations = count_operations(config)
        hard_operations = _operations(config, operations.random_step, operations.scoring)
        costs[arm.name] = StepCost(
            step_seconds=sum(share * typical(seconds[name]) for name, share in shares.items()),
            render_cpu_seconds=sum(share * kinds[name][2] for name, share in shares.items()),
            views_per_image=sum(share * kinds[name][1].global_views.plan.num_views for name, share in shares.items()),
            forwards_per_image=_forwards(config) / every + 2 * (1 - 1 / every),
            counted_operations=hard_operations / every + operations.random_step * (1 - 1 / every),
            memory_bytes=float(estimate_memory(config).peak),
        )
    return costs


def _prepare(
    config: RunConfig, dataset: Dataset, device: torch.device, *, is_hard: bool
) -> tuple[RunConfig, DeviceBatch, float]:
    """Render a batch of a hard step (step 0), or of a vanilla step (step 1) of an arm that has both."""
    step = 0 if is_hard else 1
    order = build_order(config, dataset)
    request_of = requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})
    context = build_render_context(config, dataset, "cpu")
    rendered = [render_batch(context, request_of(step)) for _ in range(2)]
    on_device = CopyToDevice(device)(rendered[-1])
    return config, on_device, min(batch.render_cpu_seconds for batch in rendered)


def _seconds_of_step(trainee: Any, batch: DeviceBatch, config: RunConfig, device: torch.device) -> float:
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        train_step(trainee, batch, config)
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    start = time.process_time()
    train_step(trainee, batch, config)
    return time.process_time() - start


def _scores(config: RunConfig) -> bool:
    return needs_scores_at(config.selection, step=0)


def _forwards(config: RunConfig) -> int:
    views = config.selection.num_candidate_views
    return _trained_views(config) + (views if _scores(config) else 0)


def _operations(config: RunConfig, random_step: int, scoring: int) -> float:
    return random_step * _trained_views(config) / 2 + (scoring if _scores(config) else 0)


def _trained_views(config: RunConfig) -> int:
    candidates = candidates_of(config.selection, config.views, step=0)
    return RULES[config.selection.rule].num_trained_views(candidates)[0]
