"""The trainer's side of the pool: a bounded look-ahead, in order, that survives the death of workers.

What it promises:
- Success: batches come in the order of the steps, each exactly once; at most `batches_in_flight` are asked for and
  not yet taken. Of those that have arrived one is copied to the device ahead of its step; the others wait in the object
  store. So the device holds two: this one, and the one in use, which the trainer drops before it takes the next.
- A worker dies, cannot be reached, loses an object, or is late: the same request goes to another worker. Requests
  are pure addresses, so the repeated batch has the same bits.
- The constructor of a worker raises (its code is missing, the data has changed): Ray does not start it again. A warning
  says why, others go on, and without others `next_batch` raises `StageError` with the reason.
- A worker reports an error of the data or of the program: it is raised by `next_batch`, not repeated.
- A position that was in flight at three deaths is taken apart (`isolation.py`); images that crash a decoder on their
  own are quarantined for all steps to come, all others go on. A worker whose machine cannot do this is passed over.
- With view finishers (`cluster.ship=pixels`) a batch takes two calls: a worker decodes, then a finisher beside the trainer
  renders. Each is repeated on its own; decoded pixels that are lost are decoded again.
- Nothing arrives for `stall_seconds`: `next_batch` raises `StageError` with the numbers.
- `close` returns at once; what is under way is dropped.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError

from hvp_ray.config import ClusterConfig
from hvp_ray.errors import HvpRayError, StageError
from hvp_ray.records import BatchRequest, ViewBatch
from hvp_ray.stream.batches import RequestOf
from hvp_ray.stream.device import BATCHES_ON_DEVICE, DeviceBatch, DeviceHandOver
from hvp_ray.stream.stats import StreamStats
from hvp_ray.stream.team import Member, Team

logger = logging.getLogger(__name__)

DEATHS_BEFORE_ISOLATION = 3
_POLL_SECONDS = 0.25
"""Between two looks for late batches and dead workers. What arrives is heard at once: a call that is asked while the thread
waits for others is for a later step than theirs. (At 0.05 s looking took 0.6 % of a CPU.)"""
_PROBE_SECONDS = 0.5
_REPEATABLE = (RayActorError, ObjectLostError, GetTimeoutError, WorkerCrashedError)


_Kind = Literal["render", "decode", "finish", "isolate"]


@dataclass(slots=True)
class _Call:
    """One request under way at one worker or finisher."""

    step: int
    worker: Member
    asked_at: float
    kind: _Kind
    decoded: "_Decoded | None" = None
    """Of kind decode: what it will return; of kind finish: what it was given."""


@dataclass(frozen=True, slots=True)
class _Decoded:
    """The first half of a batch, in the object store; read by the finisher only."""

    draft: Any
    """Reference of a BatchDraft."""
    images: Any
    """Reference of DecodedImages."""
    worker: Member
    """Who decoded it."""
    asked_at: float


class ViewStream:
    """See the module. One thread watches calls, one copies to the device; `next_batch` belongs to the trainer's thread."""

    def __init__(
        self,
        workers: list[ActorHandle[Any]],
        request_of: RequestOf,
        *,
        first_step: int,
        end_step: int,
        cluster: ClusterConfig,
        hand_over: DeviceHandOver,
        rank: int = 0,
        num_ranks: int = 1,
        finishers: Sequence[ActorHandle[Any]] = (),
    ) -> None:
        self.stats = StreamStats()
        self._workers = Team("view worker", workers, rank=rank, num_ranks=num_ranks)
        self._finishers = Team("view finisher", finishers)
        self._request_of = request_of
        self._end_step = end_step
        self._cluster = cluster
        self._num_ahead = int(cluster.batches_in_flight)  # a number: the caller has resolved auto
        self._hand_over = hand_over
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._calls: dict[Any, _Call] = {}
        self._requests: dict[int, BatchRequest] = {}
        self._deaths: Counter[int] = Counter()
        self._quarantined_ids: tuple[int, ...] = ()
        self._cannot_isolate: list[Member] = []
        """Workers whose machine failed to look for crashing images."""
        self._unassigned: deque[int] = deque()
        self._unfinished: dict[int, _Decoded] = {}
        """step -> decoded images for which no finisher was up."""
        self._arrived: dict[int, ViewBatch] = {}
        self._ready: dict[int, DeviceBatch] = {}
        self._next_to_ask = first_step
        self._next_to_hand_over = first_step
        self._next_to_take = first_step
        self._error: BaseException | None = None
        self._closed = False
        self._started_at = time.perf_counter()
        with self._lock:
            self._ask_ahead()
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"view-stream-{name}", daemon=True)
            for name, work in (("watch", self._watch), ("copy", self._copy_ahead))
        ]
        for thread in self._threads:
            thread.start()

    def next_batch(self) -> DeviceBatch:
        """Return the next step's batch, on its way to the device. The caller has dropped the one before.

        Raises:
            StageError: no batch came for `stall_seconds`.
            HvpRayError: a worker reported an error that repeating does not mend.
            StopIteration: all steps were taken.
        """
        if self._next_to_take >= self._end_step:
            raise StopIteration
        start = time.perf_counter()
        deadline = start + self._cluster.stall_seconds
        self._hand_over.release()
        with self._changed:
            while self._next_to_take not in self._ready:
                if self._error is not None:
                    raise self._error
                if time.perf_counter() > deadline:
                    raise StageError(self._describe_stall())
                self._changed.wait(timeout=0.5)
            batch = self._ready.pop(self._next_to_take)
            self._next_to_take += 1
            self._changed.notify_all()  # the next one may be copied
            self._ask_ahead()
        now = time.perf_counter()
        self.stats.record_wait(now - start, since_start=now - self._started_at)
        return batch

    def numbers(self) -> dict[str, float]:
        """Return what `stream.metrics` publishes of this stream; any thread may ask."""
        stats = self.stats
        with self._lock:
            ready, asked = len(self._ready) + len(self._arrived), self._next_to_ask - self._next_to_take
            up = self._workers.num_up()
        return {
            "hvp_ray_ready_batches": float(ready),
            "hvp_ray_under_way_batches": float(asked - ready),
            "hvp_ray_up_workers": float(up),
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
        """Stop watching; calls under way end unheard."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=10.0)
        for held in (self._calls, self._unfinished, self._arrived, self._ready):
            held.clear()

    # Everything below holds the lock, except the waiting itself.

    def _ask_ahead(self) -> None:
        while self._next_to_ask < min(self._end_step, self._next_to_take + self._num_ahead):
            step = self._next_to_ask
            self._requests[step] = replace(self._request_of(step), quarantined_ids=self._quarantined_ids)
            self._next_to_ask += 1
            self._unassigned.append(step)
        self._assign()

    def _assign(self) -> None:
        for step in sorted(self._unfinished):
            finisher = self._finishers.least_busy()
            if finisher is None:
                break
            self._finish(step, self._unfinished.pop(step), finisher)
        while self._unassigned:
            is_isolated = self._deaths[self._unassigned[0]] >= DEATHS_BEFORE_ISOLATION
            worker = self._workers.least_busy(other_than=self._cannot_isolate if is_isolated else ())
            if worker is None:
                return
            self._ask(self._unassigned.popleft(), worker)

    def _ask(self, step: int, worker: Member) -> None:
        request, now = self._requests[step], time.perf_counter()
        worker.num_calls += 1
        if self._deaths[step] >= DEATHS_BEFORE_ISOLATION:
            self._calls[worker.handle.find_crashing_ids.remote(request)] = _Call(step, worker, now, "isolate")
        elif self._finishers.members:
            draft, images = worker.handle.decode.options(num_returns=2).remote(request)
            self._calls[draft] = _Call(step, worker, now, "decode", _Decoded(draft, images, worker, now))
        else:
            self._calls[worker.handle.render.remote(request)] = _Call(step, worker, now, "render")
        self._changed.notify_all()  # the thread may wait for something to do

    def _finish(self, step: int, decoded: _Decoded, finisher: Member) -> None:
        reference = finisher.handle.finish.remote(decoded.draft, decoded.images)
        finisher.num_calls += 1
        self._calls[reference] = _Call(step, finisher, time.perf_counter(), "finish", decoded)

    def _run(self, work: Callable[[], None]) -> None:
        """Do the work of a thread; what it raises is raised by `next_batch`."""
        try:
            work()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            if not isinstance(error, Exception):
                raise

    def _watch(self) -> None:
        while not self._closed:
            with self._lock:
                references = list(self._calls)
                probes = {w.probe: w for w in self._workers.members + self._finishers.members if w.probe is not None}
            if references or probes:
                done, _ = ray.wait([*references, *probes], num_returns=1, timeout=_POLL_SECONDS, fetch_local=True)
            else:
                done = []
                with self._changed:
                    if not self._calls and not self._closed:
                        self._changed.wait(timeout=_POLL_SECONDS)
            for reference in done:
                if reference in probes:
                    self._hear_probe(probes[reference], reference)
                else:
                    self._hear(reference)
            # The batches' memory in the store must not hang on local names while this thread waits.
            del references, done
            with self._changed:
                self._probe_workers()
                self._repeat_late()
                self._assign()

    def _copy_ahead(self) -> None:
        """Keep one batch on the device, or on its way to it, beside the one that the trainer uses."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_copy())
                if self._closed:
                    return
            self._copy_next()

    def _may_copy(self) -> bool:
        return len(self._ready) < BATCHES_ON_DEVICE - 1 and self._next_to_hand_over in self._arrived

    def _copy_next(self) -> None:
        step = self._next_to_hand_over
        device_batch = self._hand_over(self._arrived[step])
        with self._changed:
            if self._closed:
                return
            del self._arrived[step]
            self._requests.pop(step)
            self._unfinished.pop(step, None)
            self._ready[step] = device_batch
            self._next_to_hand_over += 1
            self._changed.notify_all()

    def _hear(self, reference: Any) -> None:
        """Take the answer of a call that has ended."""
        with self._lock:
            call = self._calls.pop(reference)
            call.worker.num_calls -= 1
        try:
            answer = ray.get(reference, timeout=self._cluster.late_seconds)
        except RayTaskError as error:
            cause = error.cause
            if call.kind == "isolate" and isinstance(cause, StageError):
                with self._changed:
                    self._pass_over(call, cause)
                return
            if not isinstance(cause, ObjectLostError):
                raise (cause if isinstance(cause, HvpRayError) else error) from None
            with self._changed:
                self._lose(call, cause)  # what a finisher was to render went with the node that held it
            return
        except _REPEATABLE as error:
            with self._changed:
                self._lose(call, error)
            return
        if call.kind == "isolate":
            with self._changed:
                self._quarantine(call.step, answer)
            return
        with self._changed:
            if call.step < self._next_to_hand_over or call.step in self._arrived:
                return  # a late twin of a batch that is here already
            if call.kind == "decode":
                assert call.decoded is not None
                if not self._is_being_finished(call.step):
                    self._unfinished[call.step] = call.decoded
                    self._assign()
                return
            self._arrived[call.step] = answer
            asked_at = call.asked_at if call.decoded is None else call.decoded.asked_at
            self.stats.record_arrival(answer, time.perf_counter() - asked_at)
            self._changed.notify_all()

    def _is_being_finished(self, step: int) -> bool:
        """Tell whether a finisher works on a step and is not late with it."""
        typical, now = self.stats.typical_seconds(), time.perf_counter()
        since = [call.asked_at for call in self._calls.values() if call.step == step and call.kind == "finish"]
        return bool(since) and (typical is None or now - max(since) <= self._late_limit(typical))

    def _lose(self, call: _Call, error: BaseException) -> None:
        """Put a step back that a worker could not answer."""
        worker = call.worker
        if isinstance(error, RayActorError):
            self.stats.num_worker_deaths += 1
            decoded_nothing = call.kind == "finish" or error.actor_init_failed  # so no image has killed it
            self._deaths[call.step] += not decoded_nothing
            if worker.is_up:
                logger.warning("%s is gone (%s); its batches go to others", worker.name, _line(error))
            worker.is_up = False
            worker.probe_after = time.perf_counter() + _PROBE_SECONDS
        under_way = any(other.step == call.step for other in self._calls.values())
        here = call.step < self._next_to_hand_over or call.step in self._arrived
        if under_way or here or call.step in self._unfinished:
            return
        self.stats.num_retries += 1
        if call.kind == "finish" and isinstance(error, RayActorError):
            assert call.decoded is not None
            self._unfinished[call.step] = call.decoded
        else:
            self._unassigned.appendleft(call.step)
            self._unassigned = deque(sorted(self._unassigned))

    def _quarantine(self, step: int, crashing_ids: list[int]) -> None:
        if step not in self._requests or step in self._arrived:
            return  # another worker has rendered it in the meantime
        self.stats.num_isolations += 1
        self._deaths[step] = 0
        if crashing_ids:
            logger.error("step %d: images %s crash the decoder and are quarantined", step, crashing_ids)
        self._quarantined_ids = tuple(sorted({*self._quarantined_ids, *crashing_ids}))
        for asked, request in self._requests.items():
            self._requests[asked] = replace(request, quarantined_ids=self._quarantined_ids)
        self._unassigned.appendleft(step)

    def _pass_over(self, call: _Call, error: StageError) -> None:
        """Look for crashing images at another worker: this one's machine is at fault.

        Raises:
            StageError: no worker can do it.
        """
        self._cannot_isolate.append(call.worker)
        if all(worker in self._cannot_isolate for worker in self._workers.members):
            raise error
        logger.warning("%s cannot look for crashing images, another one does: %s", call.worker.name, error)
        self._lose(call, error)

    def _probe_workers(self) -> None:
        """Ask dead workers whether they are back; Ray starts them again."""
        now = time.perf_counter()
        for worker in self._workers.members + self._finishers.members:
            if not worker.is_up and worker.lost is None and worker.probe is None and now >= worker.probe_after:
                worker.probe = worker.handle.process_id.remote()

    def _hear_probe(self, worker: Member, reference: Any) -> None:
        try:
            ray.get(reference, timeout=1.0)
            is_up = True
            failure = None
        except (*_REPEATABLE, RayTaskError) as error:
            is_up, failure = False, error
        with self._changed:
            worker.probe = None
            worker.is_up = is_up
            worker.probe_after = time.perf_counter() + _PROBE_SECONDS
            if is_up:
                logger.warning("%s is back", worker.name)
            if isinstance(failure, RayActorError) and failure.actor_init_failed:
                self._give_up(worker, failure)

    def _give_up(self, worker: Member, error: RayActorError) -> None:
        """Note that the constructor of an actor raised, after which Ray does not start it again.

        Raises:
            StageError: it was the last one.
        """
        worker.lost = _line(error)
        logger.warning("%s is lost for the run: %s", worker.name, worker.lost)
        team = self._workers if worker in self._workers.members else self._finishers
        if all(member.lost is not None for member in team.members):
            raise StageError(f"no {team.title} is left: {worker.lost}")

    def _repeat_late(self) -> None:
        typical = self.stats.typical_seconds()
        if typical is None:
            return
        limit, now = self._late_limit(typical), time.perf_counter()
        calls_of_step: dict[int, list[_Call]] = {}
        for call in self._calls.values():
            if call.step >= self._next_to_hand_over and call.step not in self._arrived:
                calls_of_step.setdefault(call.step, []).append(call)
        for step, calls in calls_of_step.items():
            newest = max(calls, key=lambda call: call.asked_at)
            seconds = now - newest.asked_at
            if seconds <= limit:
                continue
            burdened = [call.worker for call in calls]
            finisher = None
            if newest.kind == "finish" and newest.decoded is not None:
                burdened.append(newest.decoded.worker)
                finisher = self._finishers.least_busy(other_than=burdened)
            # Where all finishers wait for these pixels, the way to them is slow: another worker decodes them again.
            other = finisher or self._workers.least_busy(other_than=burdened)
            if other is None:
                continue
            logger.warning("step %d is late (%.1f s); asked again", step, seconds)
            self.stats.num_retries += 1
            if finisher is not None and newest.decoded is not None:
                self._finish(step, newest.decoded, finisher)
            else:
                self._ask(step, other)

    def _late_limit(self, typical_seconds: float) -> float:
        return max(self._cluster.late_seconds, self._cluster.late_factor * typical_seconds)

    def _describe_stall(self) -> str:
        up = ", ".join(team.describe() for team in (self._workers, self._finishers) if team.members)
        return (
            f"no batch for step {self._next_to_take} within cluster.stall_seconds={self._cluster.stall_seconds:.0f}: "
            f"{up}, {len(self._calls)} calls under way, "
            f"{self.stats.num_retries} repeated, {self.stats.num_worker_deaths} calls lost to deaths; "
            f"see the workers' logs (`ray logs`), then start the run again with its name to go on"
        )


def _line(error: BaseException) -> str:
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return f"it could not start: {str(error).strip().splitlines()[-1]}"
    return type(error).__name__
