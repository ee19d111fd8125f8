"""The training loop: it takes batches from a stream and notifies an observer. It imports neither Ray nor the recorder.

The position advances when the optimizer's step is done, never on delivery.
"""

import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hvp_ray.config import RunConfig
from hvp_ray.logs import note_step
from hvp_ray.methods.method import StepPosition
from hvp_ray.selection import selection_at
from hvp_ray.stream.batches import BatchStream
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.training.optimizers import set_schedule
from hvp_ray.training.schedules import learning_rate_at, weight_decay_at
from hvp_ray.training.step import StepMetrics, train_step
from hvp_ray.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopResult:
    """The measurements of the loop."""

    num_steps_done: int
    """Optimizer steps of the whole run, including earlier attempts."""
    train_seconds: float
    """Wall time of this attempt, from the arrival of the first batch to the last step."""
    step_seconds: list[float]
    """Wall time of each step of this attempt, including the wait for its batch."""
    stopped_early: bool


@runtime_checkable
class LoopObserver(Protocol):
    """Is notified of every step. All ranks call its methods in lock-step."""

    def before_step(self, batch: DeviceBatch) -> None:
        """Receive a batch before it is trained on."""
        ...

    def after_step(self, steps_done: int, batch: DeviceBatch, metrics: StepMetrics, learning_rate: float) -> None:
        """Receive the metrics of a step."""
        ...

    def save_checkpoint(self, steps_done: int) -> None:
        """Save a checkpoint."""
        ...

    def stop_requested(self) -> bool:
        """Tell whether this rank was asked to stop."""
        ...


def run_loop(
    trainee: Trainee,
    stream: BatchStream,
    config: RunConfig,
    observer: LoopObserver,
    *,
    first_step: int,
    num_steps: int,
    steps_per_epoch: int,
) -> LoopResult:
    """Train from `first_step` (the number of steps done so far) to `num_steps`, or until any rank is asked to stop.

    Raises:
        TrainingError: the loss is not finite, or the observer ends the run.
        StageError: the stream stopped delivering batches.
        DataError: too many images are unreadable.
    """
    trainee.method.train()
    step_seconds: list[float] = []
    stopped_early = False
    started_at = last_at = time.perf_counter()
    steps_done = first_step
    for step in range(first_step, num_steps):
        note_step(step)
        batch = stream.next_batch()
        if step == first_step:
            started_at = last_at = time.perf_counter()
        observer.before_step(batch)
        position = StepPosition(step=step, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
        rate = learning_rate_at(config.optimizer, position, images_per_step=config.training.images_per_step)
        set_schedule(trainee.optimizer, learning_rate=rate, weight_decay=weight_decay_at(config.optimizer, position))
        trainee.method.begin_step(position)
        of_step = selection_at(config.selection, step, num_steps)
        metrics = train_step(trainee, batch, config, of_step, stop_requested=observer.stop_requested())
        steps_done = step + 1
        observer.after_step(steps_done, batch, metrics, rate)
        del batch  # makes room for the stream's next copy; the device holds `BATCHES_ON_DEVICE`
        now = time.perf_counter()
        step_seconds.append(now - last_at)
        last_at = now
        stopped_early = metrics.stop_requested and steps_done < num_steps
        due = steps_done % config.training.checkpoint_every_steps == 0
        if due or stopped_early or steps_done == num_steps:
            observer.save_checkpoint(steps_done)
        if stopped_early:
            break
    return LoopResult(
        num_steps_done=steps_done,
        train_seconds=time.perf_counter() - started_at,
        step_seconds=step_seconds,
        stopped_early=stopped_early,
    )
