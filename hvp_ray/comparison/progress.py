"""Progress of a comparison's runs, read from their logs with few requests."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from hvp_ray.comparison.study import PlannedRun
from hvp_ray.errors import first_line
from hvp_ray.files import is_uri
from hvp_ray.tracking.run_log import last_recorded_step

logger = logging.getLogger(__name__)

_BUCKET_SECONDS = 30.0
"""Seconds between reads of a bucket, which gets new records with each checkpoint only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonProgress:
    """Progress of a comparison."""

    num_done: int
    num_runs: int
    steps_done: int
    num_steps: int
    running: dict[str, float]
    """Name of a run in progress -> share of its steps that are done."""


ShowProgress = Callable[[ComparisonProgress], None]


class ProgressReader:
    """Reads the steps of runs in progress from their logs, and remembers the others.

    A folder is read at each call. A bucket gets a list and at least one read for each run in progress every 30 s, however
    often it is called, and none for the others.
    """

    def __init__(self, runs: Sequence[PlannedRun], done: Collection[str]) -> None:
        """Read once how far the runs that are not done have come.

        Args:
            runs: all runs of the comparison.
            done: names of the finished ones.
        """
        self._runs = {run.name: run for run in runs}
        self._done = set(done)
        self._steps = {run.name: run.num_steps if run.name in self._done else 0 for run in runs}
        self._interval = _BUCKET_SECONDS if any(is_uri(run.location) for run in runs) else 0.0
        self._read_at = time.monotonic()
        self._read([name for name in self._runs if name not in self._done])

    def note_end(self, name: str) -> None:
        """Record that a run has ended well."""
        self._done.add(name)
        self._steps[name] = self._runs[name].num_steps

    def read(self, running: Collection[str]) -> ComparisonProgress:
        """Return the progress; `running` has the names of runs in progress."""
        now = time.monotonic()
        if now - self._read_at >= self._interval:
            self._read_at = now
            self._read(running)
        steps = {name: self._steps[name] for name in running if name not in self._done}
        return ComparisonProgress(
            num_done=len(self._done),
            num_runs=len(self._runs),
            steps_done=sum(self._steps.values()),
            num_steps=sum(run.num_steps for run in self._runs.values()),
            running={name: step / self._runs[name].num_steps for name, step in steps.items() if step},
        )

    def _read(self, names: Collection[str]) -> None:
        for name in names:
            try:
                self._steps[name] = last_recorded_step(self._runs[name].location)
            except OSError as error:
                logger.debug("progress of %s: %s", name, first_line(error))
                return  # one failure at a time, because each may take seconds
