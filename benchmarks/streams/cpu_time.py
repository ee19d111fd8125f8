"""Who spent CPU time between two moments: this process and everything that it has started, Ray's processes included.

CPU time is what a busy machine distorts least. A process that ended in between is not seen.
"""

import os
import time
from collections.abc import Collection
from dataclasses import dataclass

import psutil

CpuTimes = dict[int, tuple[str, float]]
"""Process id -> name, seconds of CPU time so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuSpent:
    """Seconds of CPU time between two moments."""

    workers: float
    """Processes that render."""
    consumer: float
    """This process."""
    raylets: float
    """Ray's daemons on the nodes; the object store is a thread of them."""
    rest: float
    """Everything else: Ray's control service, its agents, workers without work."""

    @property
    def outside_rest(self) -> float:
        return self.workers + self.consumer + self.raylets

    def times(self, factor: float) -> "CpuSpent":
        """Return `factor` times as much."""
        return CpuSpent(
            workers=factor * self.workers,
            consumer=factor * self.consumer,
            raylets=factor * self.raylets,
            rest=factor * self.rest,
        )


def read_cpu_times() -> CpuTimes:
    """Return the CPU time so far of this process and of all below it."""
    this = psutil.Process()
    times = {}
    for process in [this, *this.children(recursive=True)]:
        try:
            times[process.pid] = (process.name(), _cpu_seconds(process))
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return times


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        # Linux: the CPU clock of another process (clock_getcpuclockid), in ns; psutil has hundredths of a second.
        return time.clock_gettime((~process.pid << 3) | 2)
    except OSError:
        used = process.cpu_times()
        return used.user + used.system


def cpu_spent(before: CpuTimes, after: CpuTimes, *, workers: Collection[int], consumer: int | None = None) -> CpuSpent:
    """Return who spent what. A process that is new counts from its start.

    Args:
        before: first moment.
        after: second moment.
        workers: process ids of those that render.
        consumer: process id of the one that takes the batches; None: this one.
    """
    consumer = os.getpid() if consumer is None else consumer
    spent = {"workers": 0.0, "consumer": 0.0, "raylets": 0.0, "rest": 0.0}
    for process_id, (name, seconds) in after.items():
        if process_id in workers:
            kind = "workers"
        elif process_id == consumer:
            kind = "consumer"
        else:
            kind = "raylets" if name == "raylet" else "rest"
        spent[kind] += seconds - before.get(process_id, (name, 0.0))[1]
    return CpuSpent(**spent)
