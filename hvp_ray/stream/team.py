"""Choose the actor that serves a trainer's next request. Imports no Ray."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Member:
    """One actor, as one trainer sees it."""

    handle: Any
    name: str
    is_up: bool = True
    num_calls: int = 0
    """Requests of this trainer that it serves now."""
    probe_after: float = 0.0
    """Time of the next probe while it is down, in seconds of `time.perf_counter`."""
    lost: str | None = None
    """Why it never recovers; None: it may."""


class Team:
    """Interchangeable actors, used in turn.

    Trainers do not know each other's calls. Each starts at another member, evenly spread, and goes round. So trainers that
    run in step load all members equally, without bursts.

    Args:
        title: title of one member.
        handles: handles of the members.
        rank: this trainer.
        num_ranks: trainers that share the members.
    """

    def __init__(self, title: str, handles: Sequence[Any], *, rank: int = 0, num_ranks: int = 1) -> None:
        self.members = [Member(handle, f"{title} {index}") for index, handle in enumerate(handles)]
        self.title = title
        self._turn = rank * len(handles) // num_ranks

    def num_up(self) -> int:
        """Return how many members are up."""
        return sum(member.is_up for member in self.members)

    def describe(self) -> str:
        """Describe the team in a line for an error message."""
        lost = "; ".join(f"{member.name} is lost: {member.lost}" for member in self.members if member.lost is not None)
        return f"{self.num_up()} of {len(self.members)} {self.title}s are up" + (f" ({lost})" if lost else "")

    def least_busy(self, *, other_than: Collection[Member] = ()) -> Member | None:
        """Return the member with the fewest calls of this trainer, in turn; None if no other member is up."""
        count = len(self.members)
        in_turn = [self.members[(self._turn + offset) % count] for offset in range(count)]
        up = [member for member in in_turn if member.is_up and member not in other_than]
        if not up:
            return None
        chosen = min(up, key=lambda member: member.num_calls)
        self._turn = self.members.index(chosen) + 1
        return chosen
