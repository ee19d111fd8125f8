"""A trainer whose step is a timed wait, and what it saw: how long it stood still, and where.

A machine without an accelerator has nothing better: a step on its CPUs would take them from the rendering. Like the
product's loop it holds a batch until it has the next one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopTimes:
    """Times of one loop. Waiting for the first batch is apart: it is the start, not the stream."""

    images_per_step: int
    steps_per_epoch: int
    step_seconds: float
    """Length of the timed step."""
    waits: Sequence[float]
    """[steps], seconds that the trainer stood still before each step; the first one: until the first batch."""
    seconds: float
    """From the first batch in hand to the end of the last step."""

    @property
    def images_per_second(self) -> float:
        return self.images_per_step * len(self.waits) / self.seconds

    @property
    def wait_fraction(self) -> float:
        """Share of the time since the first batch that the trainer stood still, 0 to 1."""
        return sum(self.waits[1:]) / self.seconds

    @property
    def first_epoch_wait_seconds(self) -> float:
        """Mean wait before a step of the first epoch, without its first step."""
        return _mean(self.waits[1 : self.steps_per_epoch])

    @property
    def boundary_wait_seconds(self) -> float:
        """Mean wait before the first step of an epoch, without the first epoch."""
        return _mean(self.waits[self.steps_per_epoch :: self.steps_per_epoch])

    @property
    def later_wait_seconds(self) -> float:
        """Mean wait before the other steps of later epochs."""
        later = range(self.steps_per_epoch, len(self.waits))
        return _mean([self.waits[step] for step in later if step % self.steps_per_epoch])


def run_timed(
    next_batch: Callable[[], object], *, steps: int, step_seconds: float, images_per_step: int, steps_per_epoch: int
) -> LoopTimes:
    """Take `steps` batches, each followed by a wait of `step_seconds`."""
    waits = []
    begun = None
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next_batch()
        now = time.perf_counter()
        waits.append(now - asked)
        begun = now if begun is None else begun
        time.sleep(step_seconds)
    ended = time.perf_counter()
    del batch
    assert begun is not None
    return LoopTimes(
        images_per_step=images_per_step,
        steps_per_epoch=steps_per_epoch,
        step_seconds=step_seconds,
        waits=waits,
        seconds=ended - begun,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
