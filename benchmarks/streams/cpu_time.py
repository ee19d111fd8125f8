"""Who spent CPU time between two moments: this process and everything that it has started, Ray's processes included.

CPU time is what a busy machine distorts least. The kernel counts it in hundredths of a second for each process, so look at
many seconds. A process that ended in between is not seen.
"""

import os
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


def read_cpu_times() -> CpuTimes:
    """Return the CPU time so far of this process and of all below it."""
    this = psutil.Process()
    times = {}
    for process in [this, *this.children(recursive=True)]:
        try:
            with process.oneshot():
                used = process.cpu_times()
                times[process.pid] = (process.name(), used.user + used.system)
        except psutil.NoSuchProcess:
            continue
    return times


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
