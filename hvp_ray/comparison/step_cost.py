"""Cost of a step of each arm, measured before the comparison starts: the accounting of "equal compute".

The steps of all arms run in turn in one process, on real batches. On a CPU the cost is the process's CPU time in the
least disturbed turn, because neighbours on a shared core only make a step slower. On a GPU it is the device time of the
median turn. Steps of two arms that do the same work are measured once, so they cost the same. Rendering is measured too, but
is no part of the compute: in production other machines do it.

One trainer runs, without torch.compile, whatever the runs use: see docs/reference_differences.md.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from hvp_ray.comparison.arms import Arm
from hvp_ray.config import MethodConfig, RunConfig, SelectionConfig
from hvp_ray.costs.imaginary import LATE_STEP
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.costs.operations import operations_of_step
from hvp_ray.data.dataset import Dataset
from hvp_ray.distributed.world import World
from hvp_ray.local_cache import with_local_weights
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import RULES, StepSelection, selection_at
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import build_render_context, render_batch
from hvp_ray.training.step import train_step
from hvp_ray.training.trainee import Trainee, build_trainee


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Cost of one arm's step, averaged over its hard and vanilla steps."""

    step_seconds: float
    """Trainer's step: CPU seconds of all threads, or seconds of the GPU."""
    render_cpu_seconds: float
    """CPU seconds to decode the images of a step and render their views."""
    views_per_image: float
    forwards_per_image: float
    """Global views that the student forwards per image for scoring and training. Training alone forwards two."""
    counted_operations: float
    """Floating-point operations of a step on one trainer, counted."""
    memory_bytes: float
    """Estimated peak of a trainer; see `costs/memory.py`."""

    def scaled(self, factor: float) -> "StepCost":
        """Return the cost with its seconds scaled to those of another measurement."""
        return dataclasses.replace(
            self, step_seconds=factor * self.step_seconds, render_cpu_seconds=factor * self.render_cpu_seconds
        )


@dataclass(slots=True)
class _Work:
    """What a trainer does in a step, on one batch."""

    trainee: Trainee
    config: RunConfig
    of_step: StepSelection
    batch: DeviceBatch
    seconds: list[float] = field(default_factory=list)
    """Seconds of each measured step."""


@dataclass(frozen=True, slots=True)
class _StepKind:
    """Steps of one arm: hard or vanilla, with or without a probe."""

    work: _Work
    """Shared by the arms whose steps do the same work."""
    config: RunConfig
    of_step: StepSelection
    share: float
    """Fraction of the arm's steps."""
    render_cpu_seconds: float


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
        base: recipe and overrides. One trainer's share of a step is run.
        arms: arms to measure.
        dataset: data of `base`.
        device: device of the trainers.
        repeats: least number of turns.
        at_least_seconds: least time of all measured steps together. Short steps need more turns, because on a shared
            core hardly one of 15 is undisturbed. Two measurements of the same steps gave ratios of 1.13 and 1.48.
    """
    alone = base.of_one_trainer()
    threads = torch.get_num_threads()
    torch.set_num_threads(base.training.torch_threads)
    try:
        configs = {arm.name: arm.configure(alone) for arm in arms}
        trainees = {
            _key(config): build_trainee(with_local_weights(config), World(), device, None)
            for config in configs.values()
        }
        for trainee in trainees.values():
            trainee.method.train()
            trainee.method.begin_step(LATE_STEP)
        works: dict[Hashable, _Work] = {}
        kinds = {
            name: _prepare_kinds(config, trainees[_key(config)], dataset, device, works)
            for name, config in configs.items()
        }
        for turn in itertools.count():
            if turn > repeats and sum(sum(work.seconds) for work in works.values()) >= at_least_seconds:
                break
            for work in works.values():
                # The first step after one of another size pays for memory that was given back, as steps of a run seldom do.
                _seconds_of_step(work, device)
                spent = _seconds_of_step(work, device)
                if turn:  # the first one allocates memory and the optimizer's state, and compiles kernels
                    work.seconds.append(spent)
    finally:
        torch.set_num_threads(threads)
    return {name: _cost_of(of_arm, device) for name, of_arm in kinds.items()}


def _key(config: RunConfig) -> tuple[MethodConfig, bool]:
    """Return what distinguishes the trainees of arms: the method, and whether a predictor learns."""
    return config.method, config.selection.rule == "predicted"


def _work_key(config: RunConfig, of_step: StepSelection) -> Hashable:
    """Return what the trainer's work in a step depends on. What the views show and when a step is hard are no part of it."""
    of_step = dataclasses.replace(of_step, quantile=1.0, ramp_position=1.0)
    chooses: tuple[SelectionConfig, bool] | None = (
        dataclasses.replace(
            config.selection, every=1, start_fraction=0.0, ramp_fraction=0.0, ramp_from=0.5, quantile=1.0
        ),
        config.views.slots_keep_transforms,
    )
    if of_step.rule == "first" and not of_step.needs_scores and not of_step.num_probe_images:
        of_step, chooses = dataclasses.replace(of_step, limit=None), None
    return _key(config), config.training, chooses, of_step


def _prepare_kinds(
    config: RunConfig, trainee: Trainee, dataset: Dataset, device: torch.device, works: dict[Hashable, _Work]
) -> list[_StepKind]:
    """Render a batch of the arm's first step of each kind: hard or vanilla, with or without a probe.

    Args:
        config: the arm.
        trainee: its model.
        dataset: its images.
        device: device of the trainer.
        works: the works of the arms before, by `_work_key`; those of this arm are added.
    """
    order = build_order(config, dataset)
    request_of = requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})
    context, copy_to_device = build_render_context(config, dataset, "cpu"), CopyToDevice(device)
    num_steps = config.training.total_steps(order.steps_per_epoch)
    of_steps = [selection_at(config.selection, step, num_steps) for step in range(num_steps)]
    kinds = []
    steps_of_kind: dict[tuple[bool, int], list[int]] = {}
    for step, of_step in enumerate(of_steps):
        steps_of_kind.setdefault((of_step.is_hard, of_step.num_probe_images), []).append(step)
    for steps in steps_of_kind.values():
        rendered = [render_batch(context, request_of(steps[0])) for _ in range(2)]
        cpu_seconds = min(batch.render_cpu_seconds for batch in rendered)
        share, of_step = len(steps) / num_steps, of_steps[steps[0]]
        key = _work_key(config, of_step)
        if key not in works:
            works[key] = _Work(trainee, config, of_step, copy_to_device(rendered[-1]))
        kinds.append(_StepKind(works[key], config, of_step, share, cpu_seconds))
    return kinds


def _seconds_of_step(work: _Work, device: torch.device) -> float:
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        train_step(work.trainee, work.batch, work.config, work.of_step)
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    start = time.process_time()
    train_step(work.trainee, work.batch, work.config, work.of_step)
    return time.process_time() - start


def _cost_of(kinds: Sequence[_StepKind], device: torch.device) -> StepCost:
    typical = statistics.median if device.type == "cuda" else min
    config = kinds[0].config
    parts = config.training.accumulation_steps

    def mean(value_of: Callable[[_StepKind], float]) -> float:
        return sum(kind.share * value_of(kind) for kind in kinds)

    def trained_views(kind: _StepKind) -> int:
        return RULES[kind.of_step.rule].num_trained_views(kind.of_step.candidates(config.views))[0]

    def forwards(kind: _StepKind) -> float:
        scored = scored_views(kind) if kind.of_step.needs_scores else 0.0
        return scored + (0 if scored and config.selection.reuse_student else trained_views(kind))

    def scored_views(kind: _StepKind) -> float:
        candidates, images = kind.of_step.candidates(config.views), config.images_per_rank // parts
        return 2.0 + (candidates.num_views - 2) * candidates.num_rescued(images) / images

    def probe_views(kind: _StepKind) -> float:
        return kind.of_step.num_probe_images * config.selection.num_candidate_views / config.images_per_rank

    return StepCost(
        step_seconds=mean(lambda kind: typical(kind.work.seconds)),
        render_cpu_seconds=mean(lambda kind: kind.render_cpu_seconds),
        views_per_image=mean(lambda kind: kind.of_step.num_views + probe_views(kind)),
        forwards_per_image=mean(lambda kind: forwards(kind) + probe_views(kind)),
        counted_operations=mean(lambda kind: operations_of_step(config, kind.of_step)),
        memory_bytes=float(estimate_memory(config).peak),
    )
