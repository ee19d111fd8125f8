"""Progress and speed of a run. Imports nothing slow, because the board imports it."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSteps:
    """The optimizer steps of a run."""

    first_step: int
    """Steps done before this attempt: that of the checkpoint it resumed from, or 0."""
    num_steps: int
    steps_per_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Values that are shown while a run trains."""

    first_step: int
    """Steps done before this attempt: that of the checkpoint it resumed from, or 0."""
    steps_done: int
    num_steps: int
    epoch: float
    loss: float
    images_per_second: float
    data_wait_fraction: float


ReportProgress = Callable[[Progress], bool]
"""Shows progress, without waiting, and returns whether the run was asked to stop."""


class StepClock:
    """Times the steps of this attempt on one rank, from the first batch on.

    `wait_seconds` returns how long the trainer has waited for batches, the first one left out.
    """

    def __init__(self, wait_seconds: Callable[[], float]) -> None:
        self._wait_seconds = wait_seconds
        self.num_steps = 0
        self.started_at = 0.0
        """Time at which the first batch arrived."""
        self._last_step_at = 0.0

    def start_step(self) -> None:
        """Record that a batch has arrived."""
        if not self.started_at:
            self.started_at = self._last_step_at = time.perf_counter()

    def end_step(self) -> None:
        """Record that a step is done."""
        self._last_step_at = time.perf_counter()
        self.num_steps += 1

    @property
    def seconds(self) -> float:
        """Seconds from the first batch to the end of the last step."""
        return max(self._last_step_at - self.started_at, 1e-9)

    @property
    def wait_fraction(self) -> float:
        """Share of `seconds` in which the trainer waited for batches."""
        return self._wait_seconds() / self.seconds
