"""Choose the actor that serves a trainer's next request. Imports no Ray."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Member:
    """One actor, as one trainer sees it."""

    handle: Any
    number: int
    name: str
    is_up: bool = True
    num_calls: int = 0
    """Requests of this trainer that it serves now."""
    probe_after: float = 0.0
    """Time of the next probe while it is down, in seconds of `time.perf_counter`."""
    lost: str | None = None
    """Why it never recovers; None: it may."""
    is_new: bool = False
    """It joined a team at work and has had no request yet."""


class Team:
    """Interchangeable actors, used in turn.

    Trainers do not know each other's calls. Each starts at another member, evenly spread, and goes round. So trainers that
    run in step load all members equally, without bursts.

    Args:
        title: title of one member.
        handles: number of a member -> its handle.
        rank: this trainer.
        num_ranks: trainers that share the members.
    """

    def __init__(self, title: str, handles: Mapping[int, Any], *, rank: int = 0, num_ranks: int = 1) -> None:
        self.members = [Member(handle, number, f"{title} {number}") for number, handle in handles.items()]
        self.title = title
        self._leaving: list[Member] = []
        self._rank, self._num_ranks = rank, num_ranks
        self._spread()

    def _spread(self) -> None:
        self._turn = self._rank * len(self.members) // self._num_ranks

    def follow(self, handles: Mapping[int, Any]) -> None:
        """Add members that joined. Members that are missing finish their calls and get no new ones."""
        known = {member.number for member in self.members}
        joined = [
            Member(handle, number, f"{self.title} {number}", is_new=True)
            for number, handle in handles.items()
            if number not in known
        ]
        self._leaving = [member for member in (*self._leaving, *self.members) if member.number not in handles]
        self.members = [*(member for member in self.members if member.number in handles), *joined]
        self._spread()

    def in_use(self) -> frozenset[int]:
        """Return the numbers of all members that serve a request, also of those that leave."""
        self._leaving = [member for member in self._leaving if member.num_calls]
        return frozenset(member.number for member in (*self.members, *self._leaving) if member.num_calls)

    def num_up(self) -> int:
        """Return how many members are up."""
        return sum(member.is_up for member in self.members)

    def describe(self) -> str:
        """Describe the team in a line for an error message."""
        lost = "; ".join(f"{member.name} is lost: {member.lost}" for member in self.members if member.lost is not None)
        return f"{self.num_up()} of {len(self.members)} {self.title}s are up" + (f" ({lost})" if lost else "")

    def least_busy(self, *, other_than: Collection[Member] = ()) -> Member | None:
        """Return the member with the fewest calls of this trainer, in turn; None if no other member is up.

        A new member gets its first request in its turn. Otherwise all trainers would send it their next request at once.
        """
        count = len(self.members)
        in_turn = [self.members[(self._turn + offset) % count] for offset in range(count)]
        up = [member for member in in_turn if member.is_up and member not in other_than]
        if not up:
            return None
        fewest = min((member.num_calls for member in up if not member.is_new), default=0)
        chosen = next(member for member in up if member.is_new or member.num_calls == fewest)
        chosen.is_new = False
        self._turn = self.members.index(chosen) + 1
        return chosen
