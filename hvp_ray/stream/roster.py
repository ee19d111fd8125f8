"""The exchange between the driver, which sizes the pool, and the trainers' streams. Imports no Ray.

The driver publishes a `Roster`. Every stream polls for it, and sends a `StreamReport` at the same time. Both travel
through the run's board. Neither affects results: a batch depends only on its request.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

REPORT_SECONDS = 2.0
"""Time between two reports of a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roster:
    """The view workers that get requests."""

    version: int
    """Counts the rosters of a run."""
    workers: Mapping[int, Any]
    """Number of a worker -> its handle. A number is never used twice."""
    batches_in_flight: int
    """Batches that each trainer prefetches."""
    actor_ids: tuple[str, ...]
    """Ray's ids of the workers that have not been ended, also of those that start or leave."""
    num_restarts_of_ended: int
    """How often Ray restarted the workers that have been ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamReport:
    """What one stream has measured. Totals count from the stream's start."""

    stream: str
    """Unique name of the stream: a trainer that restarts opens another one."""
    rank: int
    num_ranks: int
    node_id: str
    """Ray's id of the trainer's node."""
    version: int
    """Roster that the stream follows. It sends no new request to a worker that is missing there."""
    at_seconds: float
    """Time of the report, on a clock of the stream."""
    num_batches: int
    """Batches that the trainer has taken."""
    worker_seconds: float
    """Seconds that view workers worked on the batches that have arrived."""
    waits: Mapping[int, float]
    """Step -> seconds that the trainer waited for its batch, since the last report. The last one may not have ended."""
    in_use: frozenset[int]
    """Workers that serve a request of this stream."""
    down: frozenset[int]
    """Workers that do not answer."""
    lost: frozenset[int]
    """Workers in `down` that Ray does not restart."""


Exchange = Callable[[Callable[[], StreamReport] | None], Roster | None]
"""Takes the function that makes a report (None: no report is due). Returns a newer roster, or None. Never blocks: while a
report is unanswered, it makes no other."""
