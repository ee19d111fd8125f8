"""The one place that changes a running pool of view workers: a thread of the driver.

Every few seconds it reads the reports of the streams and the nodes of the cluster, and then

- replaces the workers of a node that Ray drains (a preemption notice, an autoscaler that takes the node), while they run;
- with `cluster.num_view_workers=auto` gives the pool the size that `stream/pool_control.py` decides.

A worker that leaves is first taken off the roster. It is ended when every trainer follows that roster and has received all
batches that it rendered, so none is lost or rendered twice. Ray itself ends a drained node once nothing runs there. A worker
that joins is put on the roster when it is up, so no request waits for its start.

Each change is one line at the driver, with its numbers. If the supervisor fails, the pool keeps its size and the run
continues.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from hvp_ray.errors import HvpRayError, first_line
from hvp_ray.launch.placement import (
    ClusterState,
    Resources,
    decide_batches_in_flight,
    room_for_view_workers,
    store_for_prefetch,
    view_workers_of_part,
)
from hvp_ray.runs.job import RunJob
from hvp_ray.stream.connect import is_ray_lost
from hvp_ray.stream.pool import START_TIMEOUT_SECONDS, ViewWorkerPool, why_not_started
from hvp_ray.stream.pool_control import LoadMeter, PoolController
from hvp_ray.stream.roster import Roster, StreamReport

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_ANSWER_SECONDS = 30.0
_FRESH_SECONDS = 15.0
"""A trainer that has reported within this time is at work."""
_GONE_SECONDS = 60.0
"""A stream that has reported nothing for this time has ended."""
_LONGEST_LEAVE_SECONDS = 300.0
"""A worker that is still in use after this time is ended. Its batches are then retried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterNodes:
    """The nodes of a Ray cluster at one moment, by Ray's id."""

    total: dict[str, Resources]
    """Resources of the nodes that are alive and not drained."""
    free: dict[str, Resources]
    """Those that no process has reserved."""
    draining: frozenset[str]


def read_nodes() -> ClusterNodes:
    """Read the nodes from Ray."""
    state = ray._private.state.state
    draining = frozenset(state.get_draining_nodes())
    free = ray._private.state.available_resources_per_node()
    total = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    usable = [node for node in total if node not in draining]
    return ClusterNodes(
        total={node: total[node] for node in usable},
        free={node: free.get(node, {}) for node in usable},
        draining=draining,
    )


@dataclass(frozen=True, slots=True)
class _Start:
    """A worker that was started and is not on the roster yet."""

    call: Any
    at: float


@dataclass(frozen=True, slots=True)
class _Leave:
    """A worker that was taken off the roster and may still be in use."""

    version: int
    """The first roster without it."""
    at: float


class PoolSupervisor(threading.Thread):
    """Sizes the pool of one run, until it is ended.

    Args:
        pool: the started pool. Only this thread changes it from now on.
        board: handle of `RunBoard`.
        job: the run.
        bytes_per_step: see `costs.prefetch.step_bytes`.
        num_sharing: runs that share the cluster, this one included.
    """

    def __init__(self, pool: ViewWorkerPool, board: Any, job: RunJob, *, bytes_per_step: int, num_sharing: int) -> None:
        super().__init__(name="pool-supervisor", daemon=True)
        cluster = job.config.cluster
        self._pool = pool
        self._board = board
        self._cluster = cluster
        self._resolved = job.resolved
        self._bytes_per_step = bytes_per_step
        self._num_sharing = num_sharing
        self._ended = threading.Event()
        self._meter = LoadMeter()
        self._controller = PoolController(cluster.max_view_workers) if cluster.num_view_workers == "auto" else None
        self._reports: dict[str, tuple[StreamReport, float]] = {}
        """Stream -> its newest report, and when it was read."""
        self._members = set(pool.workers)
        """Workers on the roster."""
        self._starting: dict[int, _Start] = {}
        self._leaving: dict[int, _Leave] = {}
        self._drained: dict[int, str] = {}
        """Worker -> the node that it leaves as soon as another one is up."""
        self._batches_in_flight = job.resolved.batches_in_flight
        self._version = 0
        self._shown: tuple[int, int] | None = None
        """Sizes of the last notice."""
        self._publish()

    def run(self) -> None:
        """Poll until the end."""
        while not self._ended.wait(_POLL_SECONDS):
            try:
                self.poll()
            except RayError as error:
                logger.warning("the pool of view workers was not checked: %s", first_line(error))
                if is_ray_lost():
                    return
            except Exception as error:
                self._show(f"the pool of view workers keeps its size from now on: {type(error).__name__}: {error}")
                logger.exception("the pool of view workers keeps its size from now on")
                return

    def end(self) -> None:
        """Stop changing the pool."""
        self._ended.set()
        self.join(timeout=0.0 if is_ray_lost() else _ANSWER_SECONDS)

    def poll(self) -> None:
        """Check the pool once."""
        now = time.monotonic()
        self._read_reports(now)
        self._receive_started(now)
        nodes = read_nodes()
        self._leave_drained_nodes(nodes, now)
        self._remove_lost(now)
        self._resize(nodes, now)
        self._end_unused(now)

    def _show(self, message: str) -> None:
        self._board.post_message.remote(message)

    def _publish(self) -> None:
        """Publish who is on the roster."""
        self._version += 1
        roster = Roster(
            version=self._version,
            workers={number: self._pool.workers[number] for number in sorted(self._members)},
            batches_in_flight=self._batches_in_flight,
            actor_ids=tuple(self._pool.actor_ids),
        )
        ray.get(self._board.publish_roster.remote(roster), timeout=_ANSWER_SECONDS)
        self._meter.restart(self._version, num_settling=self._batches_in_flight)

    def _change(self, *, joined: Collection[int] = (), left: Collection[int] = (), now: float) -> None:
        """Change the roster, and the prefetch with it."""
        self._members = (self._members | set(joined)) - set(left)
        self._batches_in_flight = self._decide_batches_in_flight()
        self._publish()
        for number in left:
            self._leaving[number] = _Leave(self._version, now)

    def _decide_batches_in_flight(self) -> int:
        """Return what the pool needs, within the object stores of the nodes that hold its batches."""
        nodes = read_nodes()
        homes = {node for number, node in self._pool.node_ids().items() if number in self._members}
        store_bytes = store_for_prefetch(
            self._cluster,
            list(nodes.total.values()),
            self._resolved.trainer_resources,
            self._resolved.view_worker_resources,
            view_nodes=[resources for node, resources in nodes.total.items() if node in homes],
        )
        try:
            return decide_batches_in_flight(
                self._cluster, len(self._members), store_bytes / self._num_sharing, self._bytes_per_step
            )
        except HvpRayError as error:  # nodes have left
            logger.warning("%s", error)
            return self._batches_in_flight

    def _read_reports(self, now: float) -> None:
        for report in ray.get(self._board.take_reports.remote(), timeout=_ANSWER_SECONDS):
            self._meter.add(report)
            self._reports[report.stream] = (report, now)
        self._reports = {
            stream: (report, at) for stream, (report, at) in self._reports.items() if now - at < _GONE_SECONDS
        }

    def _receive_started(self, now: float) -> None:
        """Put workers that are up on the roster. Leave out those that failed."""
        joined, failed = [], {}
        for number, start in list(self._starting.items()):
            is_ready = bool(ray.wait([start.call], timeout=0)[0])
            if not is_ready and (self._controller is None or now - start.at < START_TIMEOUT_SECONDS):
                continue  # a fixed number of workers waits for nodes
            del self._starting[number]
            try:
                ray.get(start.call, timeout=0.0)
                joined.append(number)
            except GetTimeoutError:
                failed[number] = f"it was not up within {START_TIMEOUT_SECONDS:.0f} s"
            except ActorUnavailableError:  # Ray restarts its process
                self._starting[number] = _Start(self._pool.workers[number].process_id.remote(), start.at)
            except RayError as error:
                failed[number] = why_not_started(error)
        if failed:
            self._pool.end(failed)
            for number, reason in failed.items():
                self._show(f"view worker {number} could not start and is left out: {reason}")
            if self._controller is not None:
                self._controller.pause(now)
        if joined:
            self._change(joined=joined, now=now)

    def _leave_drained_nodes(self, nodes: ClusterNodes, now: float) -> None:
        """Replace the workers of nodes that Ray drains. The last ones leave when another one is up."""
        if nodes.draining:
            homes = self._pool.node_ids()
            drained = {n: homes[n] for n in self._members if homes.get(n) in nodes.draining}
            news = drained.keys() - self._drained.keys()
            self._drained |= drained
            if news:
                room = self._room(nodes, homes) if self._controller is not None else len(news)
                num_new = min(room, len(news))
                self._start(num_new, now)
                self._show(
                    f"view workers {_list(news)} leave a node that is drained; {num_new} of {len(news)} are replaced"
                )
        self._drained = {number: node for number, node in self._drained.items() if number in self._members}
        down = set().union(*(report.down for report, _ in self._reports.values()))
        if self._drained and self._members - self._drained.keys() - down:
            self._change(left=list(self._drained), now=now)

    def _remove_lost(self, now: float) -> None:
        """Remove the workers that Ray does not restart from a pool that sizes itself."""
        if self._controller is None:
            return
        lost = self._members & set().union(*(report.lost for report, _ in self._reports.values()))
        if lost and lost != self._members:
            self._change(left=lost, now=now)

    def _resize(self, nodes: ClusterNodes, now: float) -> None:
        if self._controller is None or self._starting or self._drained or not self._all_train(now):
            return
        size, loads = len(self._members), self._meter.loads()
        if not loads:
            return
        homes = self._pool.node_ids()
        decision = self._controller.decide(size=size, room=self._room(nodes, homes), loads=loads, now=now)
        if decision is None:
            return
        if self._shown != (size, decision.size) or decision.size != size:
            change = f"{size} -> {decision.size}" if decision.size != size else f"stay at {size}"
            self._show(f"view workers {change}: {decision.reason}")
            self._shown = (size, decision.size)
        if decision.size > size:
            self._start(decision.size - size, now)
        elif decision.size < size:
            self._change(left=self._least_useful(size - decision.size, homes), now=now)

    def _all_train(self, now: float) -> bool:
        """Return whether all trainers are at work. If not, free resources may be theirs."""
        fresh = [report for report, at in self._reports.values() if now - at < _FRESH_SECONDS]
        expected = set(range(self._cluster.num_trainers))
        return expected <= {report.rank for report in fresh}

    def _room(self, nodes: ClusterNodes, homes: dict[int, str]) -> int:
        """Return how many more workers fit the cluster, and the part of it that this run may use."""
        worker, most = self._resolved.view_worker_resources, self._cluster.max_view_workers
        num_here = Counter(homes.values())
        room = sum(
            room_for_view_workers(nodes.total[node], nodes.free[node], worker, num_workers=num_here[node], most=most)
            for node in nodes.total
        )
        if self._num_sharing > 1:
            total: Counter[str] = Counter()
            for resources in nodes.total.values():
                total.update(resources)
            state = ClusterState(
                total=total, free=total, nodes=list(nodes.total.values()), num_sharing=self._num_sharing
            )
            room = min(room, view_workers_of_part(self._cluster, state, worker) - len(self._pool.workers))
        return max(0, room)

    def _least_useful(self, count: int, homes: dict[int, str]) -> list[int]:
        """Return the workers to give back: those that are down, then whole nodes without a trainer, the emptiest first."""
        of_trainers = {report.node_id for report, _ in self._reports.values()}
        down = set().union(*(report.down for report, _ in self._reports.values()))
        num_here = Counter(homes[number] for number in self._members if number in homes)

        def rank(number: int) -> tuple[bool, bool, int, str, int]:
            node = homes.get(number, "")
            return number not in down, node in of_trainers, num_here[node], node, -number

        return sorted(self._members, key=rank)[:count]

    def _start(self, count: int, now: float) -> None:
        if count > 0:
            self._starting |= {number: _Start(call, now) for number, call in self._pool.start(count).items()}

    def _end_unused(self, now: float) -> None:
        """End the workers that have left the roster and serve no trainer."""
        reports = [report for report, _ in self._reports.values()]
        unused = [
            number
            for number, leave in self._leaving.items()
            if now - leave.at > _LONGEST_LEAVE_SECONDS
            or all(report.version >= leave.version and number not in report.in_use for report in reports)
        ]
        self._pool.end(unused)
        for number in unused:
            del self._leaving[number]


def _list(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
