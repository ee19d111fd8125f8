"""A pool of view workers on paper: trainers that run in step, workers that take one call after the other.

Whom a trainer asks is decided by `stream.team.Team`, and the size of the pool by `stream.pool_control`, as in a run; times
are drawn. Nothing is rendered and no Ray is started, so hundreds of workers fit on one core.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hvp_ray.stream.pool_control import LoadMeter, PoolController
from hvp_ray.stream.roster import REPORT_SECONDS, StreamReport
from hvp_ray.stream.team import Member, Team


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """What is simulated."""

    num_workers: int
    num_trainers: int
    batches_in_flight: int
    capacity: float
    """Batches that all workers can render in the time in which the trainers take one each, / num_trainers."""
    variation: float = 0.1
    """Standard deviation of a batch's rendering time / its mean (gamma distributed)."""
    starts_spread: bool = True
    """Whether trainers begin with workers spread over the pool; False: trainer r begins with worker r."""


def simulate(pool: Pool, *, num_steps: int, seed: int = 0) -> float:
    """Return the waiting of the trainers for batches / the time of all steps, after the first eighth of the steps.

    A step takes one unit of time and begins when every trainer has its batch (gradients are synchronized).
    """
    generator = np.random.default_rng(seed)
    mean_seconds = pool.num_workers / pool.num_trainers / pool.capacity
    shape = 1.0 / pool.variation**2
    members = {number: number for number in range(pool.num_workers)}
    teams = [
        Team("worker", members, rank=rank if pool.starts_spread else 0, num_ranks=pool.num_trainers)
        for rank in range(pool.num_trainers)
    ]
    if not pool.starts_spread:
        for rank, team in enumerate(teams):
            for _ in range(rank):  # turns to the member that is next
                team.least_busy()
    free_at = np.zeros(pool.num_workers)
    order = itertools.count()
    answers: list[tuple[float, int, int, int, Member]] = []
    """Heap of (time, order, trainer, step, member)."""
    there: list[dict[int, float]] = [{} for _ in teams]
    """trainer -> step -> when its batch came."""

    def ask(trainer: int, step: int, now: float) -> None:
        member = teams[trainer].least_busy()
        assert member is not None
        member.num_calls += 1
        begins = max(now, free_at[member.handle])
        free_at[member.handle] = begins + generator.gamma(shape, mean_seconds / shape)
        heapq.heappush(answers, (float(free_at[member.handle]), next(order), trainer, step, member))

    def hear_until(now: float) -> None:
        while answers and answers[0][0] <= now:
            at, _, trainer, step, member = heapq.heappop(answers)
            member.num_calls -= 1
            there[trainer][step] = at

    for step in range(pool.batches_in_flight):
        for trainer in range(pool.num_trainers):
            ask(trainer, step, 0.0)
    now, waited, warm_up = 0.0, 0.0, num_steps // 8
    for step in range(num_steps):
        while any(step not in arrived for arrived in there):
            hear_until(answers[0][0])
        ready = max(arrived.pop(step) for arrived in there)
        hear_until(max(now, ready))
        if step >= warm_up:
            waited += max(0.0, ready - now)
        now = max(now, ready)
        # Each trainer takes its batch, asks for another one, and trains for one unit of time.
        for trainer in range(pool.num_trainers):
            ask(trainer, step + pool.batches_in_flight, now)
        now += 1.0
    return waited / (waited + num_steps - warm_up)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """A pool that sizes itself."""

    num_trainers: int
    num_workers: int
    """At the start."""
    render_seconds: Callable[[float], float]
    """Time in the run, in seconds -> mean seconds of rendering a batch."""
    step_seconds: float = 1.0
    """Time of a trainer's step without waiting."""
    room: Callable[[float], int] = lambda _now: 256
    """Time in the run, in seconds -> workers that fit the cluster."""
    start_seconds: float = 10.0
    """Time from the decision to start a worker until it is up."""
    variation: float = 0.1
    """Standard deviation of a batch's rendering time / its mean (gamma distributed)."""
    bottleneck_seconds: float = 0.0
    """Time that each batch takes on a link that all batches share."""

    def demand(self, now: float) -> float:
        """Return the workers that would render if trainers never waited."""
        return self.num_trainers * self.render_seconds(now) / self.step_seconds


@dataclass(slots=True)
class History:
    """What happened to a pool that sizes itself."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    """When each step began, and seconds of waiting before it."""
    sizes: list[tuple[float, int]] = field(default_factory=list)
    """When the pool began to have each size."""
    reasons: list[str] = field(default_factory=list)

    def wait_fraction(self, begin: float, end: float) -> float:
        """Return the share of the time between two moments in which trainers waited."""
        return sum(wait for at, wait in self.steps if begin <= at < end) / (end - begin)

    def sizes_within(self, begin: float, end: float) -> list[int]:
        """Return the sizes that the pool had between two moments."""
        return [
            size
            for (at, size), until in zip(self.sizes, [*(at for at, _ in self.sizes[1:]), math.inf], strict=True)
            if at < end and until > begin
        ]


class _Trainer:
    """One trainer's side: its team, its requests, and what it reports."""

    def __init__(self, rank: int, sizing: Sizing) -> None:
        self.rank = rank
        workers = {number: number for number in range(sizing.num_workers)}
        self.team = Team("worker", workers, rank=rank, num_ranks=sizing.num_trainers)
        self.version = 0
        self.in_flight = 0
        self.next_step = 0
        self.arrived: dict[int, float] = {}
        self.waits: dict[int, float] = {}
        self.worker_seconds = 0.0
        self.report_at = REPORT_SECONDS * rank / sizing.num_trainers

    def report(self, now: float, num_batches: int, num_trainers: int) -> StreamReport:
        """Return what this trainer reports, and begin the next report."""
        waits, self.waits = self.waits, {}
        return StreamReport(
            stream=str(self.rank),
            rank=self.rank,
            num_ranks=num_trainers,
            node_id="",
            version=self.version,
            at_seconds=now,
            num_batches=num_batches,
            worker_seconds=self.worker_seconds,
            waits=waits,
            in_use=self.team.in_use(),
            down=frozenset(),
            lost=frozenset(),
        )


class _Resizer:
    """The supervisor's part: decides, and publishes workers when they are up."""

    def __init__(self, sizing: Sizing, history: History) -> None:
        self._sizing = sizing
        self._history = history
        self._meter = LoadMeter()
        self._controller = PoolController(256)
        self._next_number = itertools.count(sizing.num_workers)
        self._starting: deque[float] = deque()
        self.members = list(range(sizing.num_workers))
        self.version = 1
        self._publish(0.0)

    @property
    def batches_in_flight(self) -> int:
        """Batches that each trainer prefetches, as `costs.prefetch.batches_for_workers` has it."""
        return max(4, math.ceil(len(self.members) / self._sizing.num_trainers) + 2)

    def take(self, report: StreamReport) -> None:
        """Read a report."""
        self._meter.add(report)

    def poll(self, now: float) -> None:
        """Publish workers that are up, or decide."""
        if self._starting:
            if self._starting[-1] <= now:
                self.members += [next(self._next_number) for _ in self._starting]
                self._starting.clear()
                self._publish(now)
            return
        size, room = len(self.members), max(0, self._sizing.room(now) - len(self.members))
        decision = self._controller.decide(size=size, room=room, loads=self._meter.loads(), now=now)
        if decision is None or decision.size == size:
            return
        self._history.reasons.append(f"{now:.0f} s: {size} -> {decision.size}: {decision.reason}")
        if decision.size > size:
            self._starting.extend([now + self._sizing.start_seconds] * (decision.size - size))
        else:
            self.members = self.members[: decision.size]
            self._publish(now)

    def _publish(self, now: float) -> None:
        self.version += 1
        self._meter.restart(self.version, num_settling=self.batches_in_flight)
        self._history.sizes.append((now, len(self.members)))


def simulate_sizing(sizing: Sizing, *, seconds: float, seed: int = 0) -> History:
    """Return what happens to a pool that sizes itself, in a run of so many seconds."""
    generator = np.random.default_rng(seed)
    history, order = History(), itertools.count()
    resizer = _Resizer(sizing, history)
    trainers = [_Trainer(rank, sizing) for rank in range(sizing.num_trainers)]
    free_at: dict[int, float] = {}
    link_free_at = 0.0
    shape = 1.0 / sizing.variation**2
    answers: list[tuple[float, int, _Trainer, int, Member, float]] = []
    """Heap of (time, order, trainer, step, member, seconds of rendering)."""

    def request(trainer: _Trainer, step_taken: int, now: float) -> None:
        nonlocal link_free_at
        while trainer.next_step < step_taken + trainer.in_flight:
            member = trainer.team.least_busy()
            assert member is not None
            member.num_calls += 1
            took = generator.gamma(shape, sizing.render_seconds(now) / shape)
            done = free_at[member.number] = max(now, free_at.get(member.number, 0.0)) + took
            if sizing.bottleneck_seconds:
                done = link_free_at = max(done, link_free_at) + sizing.bottleneck_seconds
            heapq.heappush(answers, (done, next(order), trainer, trainer.next_step, member, took))
            trainer.next_step += 1

    def receive_until(now: float) -> None:
        while answers and answers[0][0] <= now:
            at, _, trainer, step, member, took = heapq.heappop(answers)
            member.num_calls -= 1
            trainer.arrived[step] = at
            trainer.worker_seconds += took

    now, step, polled_at = 0.0, 0, 0.0
    while now < seconds:
        for trainer in trainers:
            trainer.in_flight = trainer.in_flight or resizer.batches_in_flight
            request(trainer, step, now)
        while any(step not in trainer.arrived for trainer in trainers):
            receive_until(answers[0][0])
        ready = now
        for trainer in trainers:
            at = trainer.arrived.pop(step)
            if step and at > now:
                trainer.waits[step] = at - now
            ready = max(ready, at)
        history.steps.append((now, ready - now))
        now = ready + sizing.step_seconds
        receive_until(now)
        step += 1
        for trainer in trainers:
            if now >= trainer.report_at:
                resizer.take(trainer.report(now, step, sizing.num_trainers))
                trainer.report_at = max(now, trainer.report_at + REPORT_SECONDS)
                if trainer.version != resizer.version:
                    trainer.version, trainer.in_flight = resizer.version, resizer.batches_in_flight
                    trainer.team.follow({number: number for number in resizer.members})
        if now >= polled_at + REPORT_SECONDS:
            resizer.poll(now)
            polled_at = now
    return history
