"""The one place that changes a running pool of view workers: a thread of the driver.

Every few seconds it reads the reports of the streams and the nodes of the cluster, and then

- replaces the workers of a node that Ray drains (a preemption notice, an autoscaler that takes the node), while they run;
- with `cluster.num_view_workers=auto` gives the pool the size that `stream/pool_control.py` decides.

A worker that leaves is first taken off the roster. It is ended when every trainer follows that roster and has received all
batches that it rendered, so none is lost or rendered twice. Ray itself ends a drained node once nothing runs there. A worker
that joins is put on the roster when it is up, so no request waits for its start.

A trainer that died needs its resources again when it restarts. So resources count as free when they have been free for a
while, less those of the trainers that are silent.

Each change is one line at the driver, with its numbers. If the supervisor fails, the pool keeps its size and the run
continues.
"""

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from hvp_ray.config import RunConfig
from hvp_ray.errors import HvpRayError, first_line
from hvp_ray.launch.board import Unread
from hvp_ray.launch.placement import (
    ClusterState,
    Resources,
    decide_batches_in_flight,
    room_for,
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
"""A trainer that has not reported for this time has died or restarts."""
_SILENT_SECONDS = 5.0
"""A trainer that has not reported for this time may have died. Resources are kept for it."""
_LASTING_SECONDS = 2.0 * _SILENT_SECONDS
"""Resources count as free after this time. Those of a trainer that dies become free before it is silent."""
_RETRY_SECONDS = 30.0
"""Time between a worker that could not start and the next replacement for a drained node."""
_HOMES_SECONDS = 30.0
"""Time for which the nodes of the workers are remembered. Reading them is one call for each worker."""
_GONE_SECONDS = 60.0
"""A stream that has reported nothing for this time has ended."""
_LONGEST_LEAVE_SECONDS = 300.0
"""A worker that is still in use after this time is ended. Its batches are then retried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterNodes:
    """The nodes of a Ray cluster at one moment, by Ray's id."""

    total: dict[str, Resources]
    """Resources of the nodes that are alive and not drained."""
    free: Mapping[str, Resources]
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
        self._controller: PoolController | None = None
        if cluster.num_view_workers == "auto":
            self._controller = PoolController(cluster.max_view_workers, has_finishers=cluster.num_finishers > 0)
        self._reports: dict[str, tuple[StreamReport, float]] = {}
        """Stream -> its newest report, and when it was read."""
        self._members = set(pool.workers) - pool.starting.keys()
        """Workers on the roster."""
        self._starting = {number: _Start(call, time.monotonic()) for number, call in pool.starting.items()}
        self._leaving: dict[int, _Leave] = {}
        self._drained: dict[int, str] = {}
        """Worker -> the node that it leaves as soon as another one is up."""
        self._failed_at = -_RETRY_SECONDS
        """When a worker could not start."""
        self._num_silent = cluster.num_trainers
        """Trainers that were not at work at the last check."""
        self._free: list[tuple[float, Mapping[str, Resources]]] = []
        """Readings of the free resources of the nodes, and when."""
        self._homes: dict[int, str] = {}
        self._homes_of: tuple[object, ...] = ()
        """Workers and nodes for which `_homes` was read."""
        self._homes_at = 0.0
        self._most_in_flight = _most_in_flight(job.config)
        self._batches_in_flight = job.resolved.batches_in_flight
        self._version = 1
        self._published = 0
        """The roster that the board has."""
        self._shown: tuple[int, int] | None = None
        """Sizes of the last notice."""
        if self._starting:
            self._publish_change()
            self._receive_started(time.monotonic())
        else:
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
                if self._ended.is_set():
                    return  # the pool was closed meanwhile
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
        if self._published < self._version:
            self._publish_change()
        self._receive_started(now)
        self._end_starting_if_a_trainer_died(now)
        nodes = self._lasting(read_nodes(), now)
        self._leave_drained_nodes(nodes, now)
        self._remove_lost(now)
        self._resize(nodes, now)
        self._end_unused(now)

    def _show(self, message: str) -> None:
        self._board.post_message.remote(message)

    def _publish(self) -> None:
        """Publish who is on the roster."""
        roster = Roster(
            version=self._version,
            workers={number: self._pool.workers[number] for number in sorted(self._members)},
            batches_in_flight=self._batches_in_flight,
            actor_ids=self._pool.actor_ids(),
            num_restarts_of_ended=self._pool.num_restarts_of_ended,
        )
        ray.get(self._board.publish_roster.remote(self._version, Unread(roster)), timeout=_ANSWER_SECONDS)
        self._published = self._version
        self._meter.restart(self._version, num_settling=self._batches_in_flight)

    def _change(self, *, joined: Collection[int] = (), left: Collection[int] = (), now: float) -> None:
        """Change the roster, and the prefetch with it. If that fails, the next poll publishes it."""
        self._members = (self._members | set(joined)) - set(left)
        self._version += 1
        self._leaving |= {number: _Leave(self._version, now) for number in left}
        self._publish_change()

    def _publish_change(self) -> None:
        self._batches_in_flight = self._decide_batches_in_flight()
        self._publish()

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
            number = decide_batches_in_flight(
                self._cluster, len(self._members), store_bytes / self._num_sharing, self._bytes_per_step
            )
        except HvpRayError as error:  # nodes have left, or have not joined yet
            logger.log(logging.DEBUG if self._starting else logging.WARNING, "%s", error)
            return self._batches_in_flight
        return min(number, self._most_in_flight)

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
            self._failed_at = now
            for number, reason in failed.items():
                self._show(f"view worker {number} could not start and is left out: {reason}")
            if self._controller is not None:
                self._controller.pause(now)
        for number in (*failed, *joined):
            del self._starting[number]
        if joined:
            self._change(joined=joined, now=now)

    def _end_starting_if_a_trainer_died(self, now: float) -> None:
        """Ray may place a worker that starts on the resources of a trainer that has died, and the trainer would wait."""
        num_silent = self._cluster.num_trainers - len(self._ranks_at_work(now, _FRESH_SECONDS))
        if num_silent > self._num_silent and self._controller is not None:
            self._pool.end(self._starting)
            self._starting.clear()
        self._num_silent = num_silent

    def _leave_drained_nodes(self, nodes: ClusterNodes, now: float) -> None:
        """Replace the workers of nodes that Ray drains. The last ones leave when another one is up.

        While there is no other one, each poll starts those for which there was no room before.
        """
        down = set().union(*(report.down for report, _ in self._reports.values()))
        if nodes.draining or self._drained:
            homes = self._read_homes(nodes, now)
            drained = {n: homes[n] for n in self._members if homes.get(n) in nodes.draining}
            news = drained.keys() - self._drained.keys()
            # Ray restarts a worker elsewhere when its node has gone. Then it need not leave.
            self._drained = {n: node for n, node in (self._drained | drained).items() if homes.get(n) == node}
            num_new = len(news)
            if self._controller is not None:
                replaced = news if self._members - self._drained.keys() - down else self._drained
                missing = len(replaced) - len(self._starting) if now - self._failed_at >= _RETRY_SECONDS else 0
                num_new = max(0, min(self._room(nodes, homes, now)[0], missing))
            self._start(num_new, now)
            if news or num_new:
                leave = news or self._drained.keys()
                self._show(
                    f"view workers {_list(leave)} are on a drained node; {num_new} of {len(leave)} replacements start"
                )
        self._drained = {number: node for number, node in self._drained.items() if number in self._members}
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
        if self._controller is None or self._starting or self._drained or not self._are_at_work(now):
            return
        size, loads = len(self._members), self._meter.loads()
        if not loads:
            return
        homes = self._read_homes(nodes, now)
        room, of = self._room(nodes, homes, now)
        if len(self._ranks_at_work(now, _SILENT_SECONDS)) < self._cluster.num_trainers:
            room, of = 0, "the cluster, in which a trainer is missing,"
        decision = self._controller.decide(size=size, room=room, loads=loads, now=now, of=of)
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

    def _ranks_at_work(self, now: float, seconds: float) -> set[int]:
        """Return the ranks that have reported within this time."""
        return {report.rank for report, at in self._reports.values() if now - at < seconds}

    def _are_at_work(self, now: float) -> bool:
        """Return whether the trainers are at work; an elastic run may have fewer than `cluster.num_trainers`."""
        num_ranks = {report.num_ranks for report, at in self._reports.values() if now - at < _SILENT_SECONDS}
        return len(num_ranks) == 1 and self._ranks_at_work(now, _SILENT_SECONDS) == set(range(max(num_ranks)))

    def _lasting(self, nodes: ClusterNodes, now: float) -> ClusterNodes:
        """Return the nodes with the resources that have been free for a while."""
        self._free = [(at, free) for at, free in self._free if now - at < _LASTING_SECONDS]
        self._free.append((now, nodes.free))
        lasting = {
            node: {
                name: min(free[node].get(name, 0.0) for _, free in self._free if node in free)
                for name in nodes.free[node]
            }
            for node in nodes.free
        }
        return replace(nodes, free=lasting)

    def _read_homes(self, nodes: ClusterNodes, now: float) -> dict[int, str]:
        """Return the node of each worker that has been placed."""
        of = (frozenset(self._pool.workers), frozenset(nodes.total), nodes.draining)
        is_complete = self._homes.keys() == set(self._pool.workers) and not self._drained
        if not is_complete or of != self._homes_of or now - self._homes_at >= _HOMES_SECONDS:
            self._homes, self._homes_of, self._homes_at = self._pool.node_ids(), of, now
        return self._homes

    def _room(self, nodes: ClusterNodes, homes: dict[int, str], now: float) -> tuple[int, str]:
        """Return how many more workers fit the cluster and the part of it that this run may use, and which is less."""
        worker, most = self._resolved.view_worker_resources, self._cluster.max_view_workers
        num_here = Counter(homes.values())
        num_silent = self._cluster.num_trainers - len(self._ranks_at_work(now, _SILENT_SECONDS))
        free = _keep(nodes.free, self._resolved.trainer_resources, num_silent)
        room, of = -len(self._pool.workers.keys() - homes.keys()), "the cluster"  # Ray places those first
        room += sum(
            room_for_view_workers(nodes.total[node], free[node], worker, num_workers=num_here[node], most=most)
            for node in nodes.total
        )
        if self._num_sharing > 1:
            total: Counter[str] = Counter()
            for resources in nodes.total.values():
                total.update(resources)
            state = ClusterState(
                total=total, free=total, nodes=list(nodes.total.values()), num_sharing=self._num_sharing
            )
            of_part = view_workers_of_part(self._cluster, state, worker) - len(self._pool.workers)
            if of_part < room:
                room, of = of_part, "the run's part of the cluster"
        return max(0, room), of

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
            or (reports and all(report.version >= leave.version and number not in report.in_use for report in reports))
        ]
        self._pool.end(unused)
        for number in unused:
            del self._leaving[number]


def _most_in_flight(config: RunConfig) -> int:
    """Return the most batches that each trainer may prefetch: with rule predicted, those whose proposals are known."""
    selection = config.selection
    return selection.predictor_delay - 1 if selection.rule == "predicted" else sys.maxsize


def _keep(free: Mapping[str, Resources], trainer: Resources, count: int) -> dict[str, Resources]:
    """Return the free resources of the nodes less those of `count` trainers, as far as trainers fit."""
    left = dict(free)
    for _ in range(count):
        node = next((node for node in left if room_for(left[node], trainer) >= 1), None)
        if node is not None:
            left[node] = {name: amount - trainer.get(name, 0.0) for name, amount in left[node].items()}
    return left


def _list(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
