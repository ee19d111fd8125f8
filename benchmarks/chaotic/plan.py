"""Draw the faults of a run from a seed, before it starts. Drawing the same run again gives the same plan."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of fault."""

    title: str
    weight: float
    """Relative frequency."""
    seconds: tuple[float, float] = (0.0, 0.0)
    """Shortest and longest duration. 0: it is over at once."""
    where: str = "everywhere"
    """Runs that it can happen to: everywhere, disk or bucket."""


KINDS = (
    Kind(title="view worker killed", weight=3),
    Kind(title="view worker paused", weight=2, seconds=(1, 20)),
    Kind(title="view host killed", weight=2),
    Kind(title="link of the view host cut", weight=2, seconds=(1, 30)),
    Kind(title="link of the view host slow", weight=2, seconds=(5, 30)),
    Kind(title="clock of the view host jumps", weight=1, seconds=(5, 30)),
    Kind(title="raylet of the view host paused", weight=1, seconds=(1, 30)),
    Kind(title="object store of the view host full", weight=1, seconds=(3, 15)),
    Kind(title="trainer killed", weight=2),
    Kind(title="trainer paused", weight=1, seconds=(1, 40)),
    Kind(title="trainer host killed", weight=1),
    Kind(title="link of the trainer host cut", weight=1, seconds=(1, 30)),
    Kind(title="link of the trainer host slow", weight=1, seconds=(5, 30)),
    Kind(title="clock of the trainer host jumps", weight=1, seconds=(5, 30)),
    Kind(title="driver killed", weight=1),
    Kind(title="head killed", weight=0.5),
    Kind(title="MLflow paused", weight=1, seconds=(5, 40)),
    Kind(title="MLflow killed", weight=1, seconds=(5, 40)),
    Kind(title="disk of the runs full", weight=2, seconds=(2, 10), where="disk"),
    Kind(title="bucket paused", weight=2, seconds=(2, 30), where="bucket"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One fault of a run."""

    step: int
    """It begins when the run has recorded this step."""
    kind: str
    seconds: float
    """Duration; 0: over at once."""
    choice: float
    """In [0, 1): chooses among equal targets, and how far a clock jumps."""


def draw_plan(
    seed: int, run: int, *, num_steps: int, num_events: int, where: str, without: frozenset[str] = frozenset()
) -> list[Event]:
    """Return the events of a run in the order of their steps.

    Args:
        seed: seed of all runs.
        run: number of the run.
        num_steps: steps of the run.
        num_events: events to draw.
        where: disk or bucket, where the run is kept.
        without: titles of kinds that this machine cannot make. They are drawn and dropped, so the others stay as they are.
    """
    generator = np.random.default_rng([seed, run])
    kinds = [kind for kind in KINDS if kind.where in ("everywhere", where)]
    weights = np.array([kind.weight for kind in kinds])
    events = []
    for _ in range(num_events):
        kind = kinds[int(generator.choice(len(kinds), p=weights / weights.sum()))]
        step, seconds, choice = (
            int(generator.integers(2, num_steps - 1)),
            generator.uniform(*kind.seconds),
            generator.random(),
        )
        events.append(Event(step=step, kind=kind.title, seconds=float(seconds), choice=float(choice)))
    return sorted((event for event in events if event.kind not in without), key=lambda event: event.step)
