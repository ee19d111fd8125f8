"""Progress of a run, as it is shown; light, because the board imports it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What is shown while a run goes on."""

    steps_done: int
    num_steps: int
    epoch: float
    loss: float
    images_per_second: float
    data_wait_fraction: float


ReportProgress = Callable[[Progress], bool]
"""Shows progress somewhere, without waiting, and returns whether the run was asked to stop."""
