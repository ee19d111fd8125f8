"""A pool of view workers on paper: trainers that run in step, workers that take one call after the other.

Whom a trainer asks is decided by `stream.team.Team`, as in a run; times are drawn. Nothing is rendered and no Ray is
started, so hundreds of workers fit on one core.
"""

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

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
    members = range(pool.num_workers)
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
