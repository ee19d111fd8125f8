"""A trainer's stream of batches from a pool of view workers.

Guarantees:
- Order: `next_batch` returns the batches in step order, each exactly once.
- Back-pressure: at most `batches_in_flight` requests are submitted and not yet taken. One batch is copied to the device
  ahead of its step; other finished batches wait in the object store. So the device holds two batches, the next one and the
  one in use, which the trainer drops before it takes the next.
- One reference per request: with view finishers (`cluster.ship=pixels`) a worker decodes and a finisher beside the trainer
  renders. The calls are chained, and only the result of the last one is watched.
- Retries: if an actor dies, is unavailable or late, or an object is lost, the whole request is retried, on other
  actors if any are up. A request is a pure address, so the retried batch has the same bits.
- Lost actors: if the constructor of an actor raises (its code is missing, the data has changed), Ray does not restart it. The
  stream warns and uses the others. Without others `next_batch` raises `StageError` with the reason.
- Errors of the data or of the program are raised by `next_batch` and not retried.
- Quarantine: a request that was in flight at three deaths of workers is submitted as a search for images that crash the
  decoder (`quarantine.py`). The images found are never decoded again. A worker whose machine cannot search is passed over.
- Members: the stream polls the driver for a new roster (`roster.py`) and reports what it measures. A worker that has left it
  gets no new request, and its answers count. A worker that joined gets requests in its turn.
- Stall: if no batch arrives for `stall_seconds`, `next_batch` raises `StageError` with the numbers.
- `close` returns at once; results of calls in flight are dropped.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

from hvp_ray.config import ClusterConfig
from hvp_ray.distributed.world import World
from hvp_ray.errors import HvpRayError, StageError
from hvp_ray.records import BatchRequest, ViewBatch
from hvp_ray.stream.batches import RequestOf
from hvp_ray.stream.device import BATCHES_ON_DEVICE, CopyToDevice, DeviceBatch
from hvp_ray.stream.roster import REPORT_SECONDS, Exchange, Roster, StreamReport
from hvp_ray.stream.stats import StreamStats
from hvp_ray.stream.team import Member, Team

logger = logging.getLogger(__name__)

DEATHS_BEFORE_SEARCH = 3
_POLL_SECONDS = 0.25
"""Time between two checks for late batches and dead workers. (Every 0.05 s they took 0.6 % of a CPU.) Results are received at
once, except for requests submitted during the wait, which are for later steps."""
_PROBE_SECONDS = 0.5
_SHORTEST_WAIT_SECONDS = 1e-4
"""Taking a batch that is there takes less."""
_ONE_RANK = World()
_RETRIED = (RayActorError, ObjectLostError, GetTimeoutError, WorkerCrashedError)


@dataclass(slots=True)
class _Pending:
    """A step that was requested and is not on the device yet."""

    request: BatchRequest
    num_submissions: int = 0
    num_deaths: int = 0
    """Deaths of workers while they served this request."""
    batch: ViewBatch | None = None
    """The result, once it has arrived."""

    @property
    def needs_search(self) -> bool:
        return self.num_deaths >= DEATHS_BEFORE_SEARCH


@dataclass(frozen=True, slots=True)
class _Call:
    """One submission of a request."""

    request: BatchRequest
    members: tuple[Member, ...]
    """The chain of actors: a worker, then a finisher if there are any."""
    submitted_at: float


class ViewStream:
    """Yields batches. One thread watches calls, one copies to the device; the trainer's thread calls `next_batch`."""

    def __init__(
        self,
        workers: Mapping[int, ActorHandle[Any]],
        request_of: RequestOf,
        steps: range,
        *,
        cluster: ClusterConfig,
        copy_to_device: CopyToDevice,
        world: World = _ONE_RANK,
        finishers: Sequence[ActorHandle[Any]] = (),
        exchange: Exchange | None = None,
    ) -> None:
        """Request the first batches.

        Args:
            workers: number of a view worker -> its handle.
            request_of: the request of any step.
            steps: steps to take.
            cluster: settings; `batches_in_flight` is resolved.
            copy_to_device: copies a batch to the device.
            world: this trainer.
            finishers: handles of the view finishers beside this trainer.
            exchange: receives reports and returns new rosters. None: `workers` stay.
        """
        self.stats = StreamStats(num_workers=len(workers))
        self._teams = [Team("view worker", workers, rank=world.rank, num_ranks=world.num_ranks)]
        if finishers:
            self._teams.append(Team("view finisher", dict(enumerate(finishers))))
        self._world = world
        self._exchange = exchange
        self._request_of = request_of
        self._end_step = steps.stop
        self._cluster = cluster
        self._max_in_flight = int(cluster.batches_in_flight)  # a number: the caller has resolved auto
        self._copy_to_device = copy_to_device
        self._changed = threading.Condition(threading.RLock())
        """Guards everything below."""
        self._pending: dict[int, _Pending] = {}
        self._calls: dict[Any, _Call] = {}
        """Calls in flight, by reference of the result."""
        self._probes: dict[Any, Member] = {}
        """Calls that end when a member that is down has recovered, by reference."""
        self._quarantined_ids: tuple[int, ...] = ()
        self._cannot_search: list[Member] = []
        self._ready: dict[int, DeviceBatch] = {}
        self._next_to_request = self._next_to_copy = self._next_to_take = steps.start
        self._name = uuid.uuid4().hex
        self._version = 0
        self._waits: dict[int, float] = {}
        """Step -> seconds of waiting, since the last report."""
        self._waiting_since: float | None = None
        """The trainer waits now. None: it does not, or for the first batch."""
        self._report_at = 0.0
        self._error: BaseException | None = None
        self._is_closed = False
        self._started_at = time.perf_counter()
        with self._changed:
            self._request_ahead()
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"view-stream-{name}", daemon=True)
            for name, work in (("watch", self._watch), ("copy", self._copy_ahead))
        ]
        for thread in self._threads:
            thread.start()

    def next_batch(self) -> DeviceBatch:
        """Return the next step's batch, whose copy to the device has started. The caller has dropped the one before.

        Raises:
            StageError: no batch arrived for `stall_seconds`.
            HvpRayError: a worker reported an error that a retry does not fix.
            StopIteration: all steps were taken.
        """
        if self._next_to_take >= self._end_step:
            raise StopIteration
        start = time.perf_counter()
        deadline = start + self._cluster.stall_seconds
        self._copy_to_device.release()
        with self._changed:
            self._waiting_since = start if self.stats.num_batches else None
            while self._next_to_take not in self._ready:
                if self._error is not None:
                    raise self._error
                if time.perf_counter() > deadline:
                    raise StageError(self._describe_stall())
                self._changed.wait(timeout=0.5)
            batch = self._ready.pop(self._next_to_take)
            now = time.perf_counter()
            self._note_wait(now)
            self._waiting_since = None
            self.stats.record_wait(now - start, since_start=now - self._started_at)
            self._next_to_take += 1
            self._request_ahead()
            self._changed.notify_all()  # the next one may be copied
        return batch

    def numbers(self) -> dict[str, float]:
        """Return the stream's metrics, named as in `stream.metrics`; any thread may call it."""
        stats = self.stats
        with self._changed:
            ready = len(self._ready) + sum(pending.batch is not None for pending in self._pending.values())
            requested = self._next_to_request - self._next_to_take
            num_up = self._teams[0].num_up()
        return {
            "hvp_ray_ready_batches": float(ready),
            "hvp_ray_under_way_batches": float(requested - ready),
            "hvp_ray_up_workers": float(num_up),
            "hvp_ray_first_batch_seconds": stats.first_batch_seconds,
            "hvp_ray_wait_seconds_total": stats.wait_seconds,
            "hvp_ray_batches_total": float(stats.num_batches),
            "hvp_ray_views_total": float(stats.views),
            "hvp_ray_view_bytes_total": float(stats.num_bytes),
            "hvp_ray_repeated_batches_total": float(stats.num_retries),
            "hvp_ray_worker_deaths_total": float(stats.num_worker_deaths),
            "hvp_ray_isolated_batches_total": float(stats.num_isolations),
        }

    def close(self) -> None:
        """Stop watching, and drop the results of calls in flight."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=10.0)
        for held in (self._calls, self._probes, self._pending, self._ready):
            held.clear()

    def _run(self, work: Callable[[], None]) -> None:
        """Run the work of a thread; `next_batch` re-raises its errors."""
        try:
            work()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            if not isinstance(error, Exception):
                raise

    def _watch(self) -> None:
        while not self._is_closed:
            self._receive_one()
            with self._changed:
                self._exchange_if_due()
                self._probe_down()
                self._retry_late()
                self._submit_waiting()

    def _copy_ahead(self) -> None:
        """Keep one batch on the device, or on its way there, beside the one that the trainer uses."""
        while not self._is_closed:
            self._copy_next()

    def _copy_next(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._batch_to_copy() is not None)
            batch = self._batch_to_copy()
        if batch is None:
            return
        device_batch = self._copy_to_device(batch)
        with self._changed:
            self._pending.pop(self._next_to_copy, None)
            self._ready[self._next_to_copy] = device_batch
            self._next_to_copy += 1
            self._changed.notify_all()

    def _receive_one(self) -> None:
        """Wait for a call or probe to end, for a short time, and take its result."""
        with self._changed:
            references = [*self._calls, *self._probes]
            if not references:
                self._changed.wait(timeout=_POLL_SECONDS)
                return
        for reference in ray.wait(references, num_returns=1, timeout=_POLL_SECONDS)[0]:
            if reference in self._probes:
                with self._changed:
                    self._end_probe(reference)
                continue
            try:
                batch = ray.get(reference, timeout=self._cluster.late_seconds)
            except (*_RETRIED, RayTaskError) as error:
                with self._changed:
                    self._fail(self._end_call(reference), error)
            else:
                with self._changed:
                    self._arrive(self._end_call(reference), batch)

    # Everything below holds the lock.

    def _note_wait(self, now: float) -> None:
        if self._exchange is None or self._waiting_since is None:
            return
        seconds = now - self._waiting_since
        if seconds > _SHORTEST_WAIT_SECONDS:
            self._waits[self._next_to_take] = seconds

    def _exchange_if_due(self) -> None:
        """Report, and follow the driver's newest roster."""
        if self._exchange is None:
            return
        roster = self._exchange(self._report if time.perf_counter() >= self._report_at else None)
        if roster is not None:
            self._follow(roster)

    def _report(self) -> StreamReport:
        now, workers = time.perf_counter(), self._teams[0]
        self._report_at = now + REPORT_SECONDS
        self._note_wait(now)
        waits, self._waits = self._waits, {}
        return StreamReport(
            stream=self._name,
            rank=self._world.rank,
            num_ranks=self._world.num_ranks,
            node_id=ray.get_runtime_context().get_node_id(),
            version=self._version,
            at_seconds=now,
            num_batches=self.stats.num_batches,
            worker_seconds=self.stats.worker_seconds,
            waits=waits,
            in_use=workers.in_use(),
            down=frozenset(member.number for member in workers.members if not member.is_up),
            lost=frozenset(member.number for member in workers.members if member.lost is not None),
        )

    def _follow(self, roster: Roster) -> None:
        """Send requests to the workers of this roster.

        Raises:
            StageError: all of them are lost.
        """
        self._version = roster.version
        self._teams[0].follow(roster.workers)
        self.stats.num_workers = len(roster.workers)
        self._max_in_flight = roster.batches_in_flight
        self._report_at = 0.0  # the driver waits for it before it ends a worker
        logger.info("views from %d workers, %d batches in flight", len(roster.workers), roster.batches_in_flight)
        self._check_some_left()
        self._request_ahead()

    def _batch_to_copy(self) -> ViewBatch | None:
        pending = self._pending.get(self._next_to_copy)
        return pending.batch if pending is not None and len(self._ready) < BATCHES_ON_DEVICE - 1 else None

    def _request_ahead(self) -> None:
        while self._next_to_request < min(self._end_step, self._next_to_take + self._max_in_flight):
            self._pending[self._next_to_request] = _Pending(self._request_of(self._next_to_request))
            self._next_to_request += 1
        self._submit_waiting()

    def _submit_waiting(self) -> None:
        """Submit the requests that no actor serves, in step order, as far as actors are up."""
        served = {call.request.step for call in self._calls.values()}
        for step, pending in self._pending.items():
            if pending.batch is None and step not in served:
                self._submit(pending)

    def _submit(self, pending: _Pending, *, late: Collection[Member] = ()) -> bool:
        """Submit a request to the least busy actors, avoiding those that are late with it.

        Returns:
            False if no actor is up that can do it and is not late.
        """
        excluded = self._cannot_search if pending.needs_search else []
        members = [
            team.least_busy(other_than=[*excluded, *late]) or team.least_busy(other_than=excluded)
            for team in self._teams
        ]
        chain = [member for member in members if member is not None]
        if len(chain) < len(self._teams) or all(member in late for member in chain):
            return False
        request = replace(pending.request, quarantined_ids=self._quarantined_ids, search_crashing=pending.needs_search)
        worker, *finishers = chain
        if finishers:
            reference = finishers[0].handle.finish.remote(worker.handle.decode.remote(request))
        else:
            reference = worker.handle.render.remote(request)
        self._calls[reference] = _Call(request, tuple(chain), time.perf_counter())
        for member in chain:
            member.num_calls += 1
        self.stats.num_retries += pending.num_submissions > 0
        pending.num_submissions += 1
        self._changed.notify_all()  # the watching thread may be idle
        return True

    def _end_call(self, reference: Any) -> _Call:
        call = self._calls.pop(reference)
        for member in call.members:
            member.num_calls -= 1
        return call

    def _arrive(self, call: _Call, batch: ViewBatch) -> None:
        pending = self._pending.get(call.request.step)
        if pending is None or pending.batch is not None:
            return  # another call was faster
        pending.batch = batch
        self.stats.record_arrival(batch, time.perf_counter() - call.submitted_at)
        self.stats.num_isolations += call.request.search_crashing
        if batch.crashing_ids:
            logger.error(
                "step %d: images %s crash the decoder and are quarantined", batch.step, list(batch.crashing_ids)
            )
            self._quarantined_ids = tuple(sorted({*self._quarantined_ids, *batch.crashing_ids}))
        self._changed.notify_all()

    def _fail(self, call: _Call, error: Exception) -> None:
        """Record the actor that failed. `_submit_waiting` retries the request.

        Raises:
            HvpRayError: a retry does not help.
        """
        # Ray raises the error of the last actor of a chain as it is, and wraps that of an earlier one.
        cause = error.cause if isinstance(error, RayTaskError) else error
        worker, last = call.members[0], call.members[-1]
        if isinstance(cause, RayActorError):
            member = last if cause is error else worker
            self.stats.num_worker_deaths += 1
            pending = self._pending.get(call.request.step)
            has_left = not any(member in team.members for team in self._teams)
            if pending is not None and member is worker and not cause.actor_init_failed and not has_left:
                pending.num_deaths += 1  # an image may have caused it
            if member.is_up:
                what = "has left the pool and ended" if has_left else "died"
                logger.warning("%s %s (%s); its requests are reassigned", member.name, what, _line(cause))
            member.is_up = False
            member.probe_after = time.perf_counter() + _PROBE_SECONDS
        elif isinstance(cause, StageError) and call.request.search_crashing:
            self._cannot_search.append(worker)
            if all(member in self._cannot_search for member in self._teams[0].members):
                raise cause
            logger.warning("%s cannot search for crashing images, another worker does: %s", worker.name, cause)
        elif not isinstance(cause, _RETRIED):
            raise (cause if isinstance(cause, HvpRayError) else error) from None

    def _probe_down(self) -> None:
        """Call members that are down; Ray restarts their processes (`_OPTIONS` in `view_worker.py`)."""
        now = time.perf_counter()
        probed = list(self._probes.values())
        for member in (member for team in self._teams for member in team.members):
            if not member.is_up and member.lost is None and member not in probed and now >= member.probe_after:
                self._probes[member.handle.process_id.remote()] = member

    def _end_probe(self, reference: Any) -> None:
        member = self._probes.pop(reference)
        try:
            ray.get(reference, timeout=1.0)
        except (*_RETRIED, RayTaskError) as error:
            member.probe_after = time.perf_counter() + _PROBE_SECONDS
            if isinstance(error, RayActorError) and error.actor_init_failed:
                self._give_up(member, error)
            return
        member.is_up = True
        logger.warning("%s has recovered", member.name)

    def _give_up(self, member: Member, error: RayActorError) -> None:
        """Record that the constructor of an actor raised, after which Ray does not restart it.

        Raises:
            StageError: it was the last one.
        """
        member.lost = _line(error)
        logger.warning("%s is lost for the run: %s", member.name, member.lost)
        self._check_some_left()

    def _check_some_left(self) -> None:
        for team in self._teams:
            reasons = [member.lost for member in team.members]
            if reasons and all(reasons):
                raise StageError(f"no {team.title} is left: {reasons[-1]}")

    def _retry_late(self) -> None:
        """Retry a request if its newest call takes much longer than usual."""
        typical = self.stats.typical_seconds()
        if typical is None:
            return
        limit = max(self._cluster.late_seconds, self._cluster.late_factor * typical)
        calls_of_step: dict[int, list[_Call]] = {}
        for call in self._calls.values():
            calls_of_step.setdefault(call.request.step, []).append(call)
        for step, calls in calls_of_step.items():
            pending = self._pending.get(step)
            seconds = time.perf_counter() - max(call.submitted_at for call in calls)
            if pending is None or pending.batch is not None or seconds <= limit:
                continue
            if self._submit(pending, late=[member for call in calls for member in call.members]):
                logger.warning("step %d is late (%.1f s) and was retried", step, seconds)

    def _describe_stall(self) -> str:
        return (
            f"no batch for step {self._next_to_take} within cluster.stall_seconds={self._cluster.stall_seconds:.0f}: "
            f"{', '.join(team.describe() for team in self._teams)}, {len(self._calls)} calls in flight, "
            f"{self.stats.num_retries} retries, {self.stats.num_worker_deaths} calls lost to deaths; "
            f"see the workers' logs (`ray logs`), then start the run again with its name"
        )


def _line(error: RayActorError) -> str:
    if error.actor_init_failed:
        return f"it could not start: {str(error).strip().splitlines()[-1]}"
    return type(error).__name__
