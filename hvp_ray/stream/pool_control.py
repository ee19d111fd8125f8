"""Decide how many view workers a run needs, from what its trainers measure. Imports no Ray and reads no clock.

A pool grows if trainers wait, and shrinks if fewer workers would do. With w the share of the time in which trainers wait, and
b the mean number of workers that render, the trainers could use b / (1 - w) workers if they never waited: the demand.
Rendering times vary, so a pool needs `CAPACITY_FACTOR` times the demand.

Sending a batch also takes a worker's time, which b does not count. And a link or a trainer may be what is slow. So each
decision is judged by its effect: a size at which trainers waited is not tried again for a while, and growth that helps little
is undone.

The supervisor (`launch/pool_supervisor.py`) carries decisions out. `benchmarks/pool_simulation.py` drives this code on paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvp_ray.stream.roster import StreamReport

CAPACITY_FACTOR = 1.2
"""Rendering capacity / demand at which trainers hardly wait (benchmarks/stream.py)."""
WINDOW_SECONDS = 20.0
"""Time over which one load is measured."""
MOST_WAITING = 0.02
"""Share of the time in which trainers may wait. Above it the pool grows."""
LITTLE_WAITING = 0.01
"""Below it for `_WINDOWS_TO_SHRINK` windows in a row the pool may shrink."""

_WINDOWS_TO_SHRINK = 3
_LEAST_SHRINKING = 0.1
"""Smallest share of the pool that is worth giving back. At least one worker is."""
_MOST_WAITING_COUNTED = 0.99
_LEAST_EFFECT = 0.3
"""Growth has helped if it had this share of the effect that it has if only workers are missing."""
_SMALL_GROWTH = 1.1
"""Growth is judged from this factor on, because loads vary as much."""
_REMEMBERED_SECONDS = 1800.0
"""Time for which a size at which trainers waited is avoided."""
_FIRST_PAUSE_SECONDS = 300.0
"""Pause after growth that did not help. It doubles each time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What the trainers of a run measured in one window."""

    wait_fraction: float
    """Share of the time in which at least one trainer waited for its batch."""
    busy_workers: float
    """Mean number of view workers that rendered."""

    @property
    def demand(self) -> float:
        """Workers that would render if trainers never waited."""
        return self.busy_workers / (1.0 - min(self.wait_fraction, _MOST_WAITING_COUNTED))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The size that the pool shall have, and why."""

    size: int
    reason: str


class LoadMeter:
    """Computes loads from the reports of all ranks.

    All trainers step together, so a step waits as long as the rank that waits longest. Waits are therefore merged by step.
    """

    def __init__(self, window_seconds: float = WINDOW_SECONDS) -> None:
        self._window_seconds = window_seconds
        self._version = 0
        self._num_settling = 0
        self._num_ranks = 0
        self._streams: dict[int, str] = {}
        """Rank -> its stream. Batches of one stream do not compare with those of another."""
        self._first_batches: dict[int, int] = {}
        """Rank -> batches taken when it began to follow the present roster."""
        self._reports: dict[int, list[StreamReport]] = {}

    def restart(self, version: int, *, num_settling: int) -> None:
        """Forget the reports: the pool has changed.

        Args:
            version: the roster of the changed pool.
            num_settling: batches that each trainer takes before the load counts; they were requested from the old pool.
        """
        self._version, self._num_settling = version, num_settling
        self._first_batches.clear()
        self._reports.clear()

    def add(self, report: StreamReport) -> None:
        """Take a report into account, unless it is of an older roster."""
        if report.version < self._version:
            return
        stream = self._streams.setdefault(report.rank, report.stream)
        if report.num_ranks != self._num_ranks or report.stream != stream:
            # Other trainers, which begin with an empty pipeline.
            self._first_batches.clear()
            self._reports.clear()
        self._num_ranks, self._streams[report.rank] = report.num_ranks, report.stream
        of_rank = self._reports.setdefault(report.rank, [])
        first = self._first_batches.setdefault(report.rank, report.num_batches)
        if report.num_batches < first + self._num_settling:
            return
        of_rank.append(report)
        oldest = report.at_seconds - (_WINDOWS_TO_SHRINK + 1) * self._window_seconds
        while of_rank[0].at_seconds < oldest:
            del of_rank[0]

    def loads(self) -> list[Load]:
        """Return the loads of the last windows, newest first; as many as there are reports for, at most three."""
        loads = []
        for index in range(_WINDOWS_TO_SHRINK):
            load = self._load(index)
            if load is None:
                break
            loads.append(load)
        return loads

    def _load(self, index: int) -> Load | None:
        busy = seconds = 0.0
        waits: dict[int, float] = {}
        for rank in range(self._num_ranks):
            reports = self._reports.get(rank, [])
            ends = [
                max(
                    (i for i, report in enumerate(reports) if report.at_seconds <= reports[-1].at_seconds - age),
                    default=None,
                )
                for age in ((index + 1) * self._window_seconds, index * self._window_seconds)
            ]
            first, last = ends
            if first is None or last is None or first == last:
                return None
            before, after = reports[first], reports[last]
            span = after.at_seconds - before.at_seconds
            busy += (after.worker_seconds - before.worker_seconds) / span
            seconds += span / self._num_ranks
            for report in reports[first + 1 : last + 1]:
                for step, wait in report.waits.items():
                    waits[step] = max(wait, waits.get(step, 0.0))
        if self._num_ranks == 0:
            return None
        return Load(wait_fraction=min(1.0, sum(waits.values()) / seconds), busy_workers=busy)


@dataclass(frozen=True, slots=True)
class _Growth:
    """The pool before it grew, until the effect is known. Small growths in a row are judged together."""

    size: int
    load: Load


class PoolController:
    """Decides the size of one run's pool.

    Args:
        most: upper bound.
        window_seconds: the meter's.
        has_finishers: whether view finishers beside the trainers render what view workers decode.
    """

    def __init__(self, most: int, *, window_seconds: float = WINDOW_SECONDS, has_finishers: bool = False) -> None:
        self._most = most
        self._suspects = "The link, the trainers or the prefetch may be slow"
        if has_finishers:
            self._suspects = f"The view finishers may be too few (cluster.finishers_per_trainer). {self._suspects}"
        self._window_seconds = window_seconds
        self._growth: _Growth | None = None
        self._paused_until = -math.inf
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._too_small: tuple[float, float] | None = None
        """Size / demand at which trainers waited, and when."""

    def pause(self, now: float) -> None:
        """Do not grow for a while, for longer each time: a worker could not start, or growth did not help."""
        self._growth = None
        self._paused_until = now + self._pause_seconds
        self._pause_seconds = min(2.0 * self._pause_seconds, _REMEMBERED_SECONDS)

    def decide(
        self, *, size: int, room: int, loads: Sequence[Load], now: float, of: str = "the cluster"
    ) -> Decision | None:
        """Return the size that the pool shall have. None: it stays.

        Args:
            size: view workers now.
            room: how many more the cluster has free resources for.
            loads: of the last windows, newest first.
            now: seconds, on any clock.
            of: what has this room, for the reason.
        """
        if not loads or loads[0].busy_workers <= 0.0:
            return None
        if loads[0].wait_fraction > MOST_WAITING:
            return self._grow(size, room, loads[0], now, of)
        if self._growth is not None:
            self._growth, self._pause_seconds = None, _FIRST_PAUSE_SECONDS
        if len(loads) < _WINDOWS_TO_SHRINK or max(load.wait_fraction for load in loads) > LITTLE_WAITING:
            return None
        return self._shrink(size, max(load.demand for load in loads), now)

    def _grow(self, size: int, room: int, load: Load, now: float, of: str) -> Decision | None:
        self._too_small = (size / load.demand, now)
        waited = f"trainers waited {load.wait_fraction:.1%} of the last {self._window_seconds:.0f} s"
        growth = self._growth
        if growth is not None and not growth.size <= size < _SMALL_GROWTH * growth.size:
            self._growth = None
        if growth is not None and size >= _SMALL_GROWTH * growth.size and not _has_helped(growth, size, load):
            self.pause(now)
            return Decision(
                size=growth.size,
                reason=f"{waited} with {size}, and {growth.load.wait_fraction:.1%} with {growth.size}, so more do not help. "
                f"{self._suspects}",
            )
        if now < self._paused_until:
            return None
        wanted = max(size + 1, math.ceil(CAPACITY_FACTOR * load.demand))
        new_size = max(size, min(wanted, 2 * size, self._most, size + room))
        if new_size > size and self._growth is None:
            self._growth = _Growth(size, load)
        bound = f"{of} has room for {room} more" if room < self._most - size else f"the limit is {self._most}"
        return Decision(size=new_size, reason=f"{waited}, {load.busy_workers:.1f} rendered on average, {bound}")

    def _shrink(self, size: int, demand: float, now: float) -> Decision | None:
        least = math.ceil(CAPACITY_FACTOR * demand)
        if self._too_small is not None and now < self._too_small[1] + _REMEMBERED_SECONDS:
            least = max(least, math.floor(self._too_small[0] * demand + 1e-9) + 1)
        new_size = max(1, least, math.ceil(size / 2))
        if size - new_size < max(1.0, _LEAST_SHRINKING * size):
            return None
        seconds = _WINDOWS_TO_SHRINK * self._window_seconds
        return Decision(
            size=new_size,
            reason=f"trainers waited less than {LITTLE_WAITING:.0%} of the last {seconds:.0f} s, and at most {demand:.1f} "
            f"rendered on average",
        )


def _has_helped(growth: _Growth, size: int, load: Load) -> bool:
    """Return whether more workers rendered, or trainers waited less. The demand may have changed in between."""
    factor, before = size / growth.size, growth.load
    expected = max(0.0, 1.0 - (1.0 - before.wait_fraction) * factor)
    waits_less = load.wait_fraction <= before.wait_fraction - _LEAST_EFFECT * (before.wait_fraction - expected)
    return waits_less or load.busy_workers >= before.busy_workers * (1.0 + _LEAST_EFFECT * (factor - 1.0))
