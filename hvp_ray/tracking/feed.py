"""A feed sends a run's log to one tracker from a thread: training never waits for it, and each step arrives once.

The log on disk is the truth, and every tracker holds a copy. The thread reads new records of metrics and evaluations, sends
them in batches, and continues after an outage. After every failure it connects again, and the tracker says which steps it
has. So nothing is lost and nothing arrives twice, also if the process was killed or a resume rewrites records.

`finish` waits a limited time for the rest. A state file in the run's folder, replaced as a whole, has the description of the
run, the tracker's own facts, and whether everything arrived. `trackers.py` sends what is missing when the run is started
again by its name.
"""

import json
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from hvp_ray.errors import ConfigError, first_line
from hvp_ray.files import write_file
from hvp_ray.tracking.run_log import EVALUATIONS, METRICS, START, Position, read_records_after

logger = logging.getLogger(__name__)

_MAX_VALUES_PER_CALL = 1000
_MAX_FAILURE_LENGTH = 300
_PAUSE_SECONDS = 2.0

Record = dict[str, Any]
"""A record of the log: step, time, metrics."""


@runtime_checkable
class Destination(Protocol):
    """The description of a run that a tracker gets; a dataclass of plain values."""

    place: ClassVar[tuple[str, ...]]
    """Fields that say where the run is kept. If one changes, the state of before does not hold."""

    @property
    def title(self) -> str:
        """Name of the tracker and of the place, for messages."""
        ...


@dataclass(kw_only=True, slots=True)
class Ending:
    """What a tracker gets at the end of a run. A feed removes what it has sent, so that a retry leaves it out."""

    status: str
    """FINISHED, FAILED or KILLED."""
    artifacts: list[Path]
    values: dict[str, float]
    time: float
    """Unix time."""

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its end."""
        return self.status == "FINISHED"


class Feed(ABC):
    """Sends a run's log to one tracker; made and finished by rank 0. Only its thread calls the abstract methods."""

    state_file: ClassVar[str]
    """Name of the state file in the run's folder."""

    def __init__(
        self,
        run: Destination,
        run_dir: Path,
        *,
        keep_state: Callable[[], None] = lambda: None,
        watches_system: bool = True,
    ) -> None:
        """Start the thread.

        Args:
            run: description of the run.
            run_dir: has the log.
            keep_state: called by the thread when the state file has facts that the next attempt needs.
            watches_system: send load and memory of this machine, because the run trains on it.
        """
        self.is_away = False
        """Whether the last attempt to send failed."""
        self._run_dir = run_dir
        self._title = run.title
        self._keep_state = keep_state
        self._watches_system = watches_system
        self._state = self._known_state(run) | {"run": asdict(run), "complete": False}  # type: ignore[call-overload]
        self._note()
        self._cursors = [_Cursor(run_dir, name) for name in (METRICS, EVALUATIONS)]
        self._is_connected = False
        self._wake = threading.Event()
        self._closing = False
        self._is_abandoned = False
        self._deadline = float("inf")
        self._num_refusals = 0
        self._failure = "no answer"
        self._ending: Ending | None = None
        self._thread = threading.Thread(target=self._work, name=f"feed of {run.title}", daemon=True)
        self._thread.start()

    @abstractmethod
    def connect(self) -> dict[str, int]:
        """Connect, or connect again after a failure; return the last step that the tracker has of each kind of records.

        A kind that is not returned: the tracker has none.
        """

    @abstractmethod
    def send(self, kind: str, records: list[Record]) -> None:
        """Send records of one kind, METRICS or EVALUATIONS, in step order."""

    @abstractmethod
    def end(self, ending: Ending) -> None:
        """Send the final values and artifacts, and end the run in the tracker."""

    def tend(self) -> None:  # noqa: B027 (most trackers need nothing)
        """Do what else is due while the run trains."""

    def leave(self) -> None:  # noqa: B027 (most trackers need nothing)
        """Stop what `tend` started, without ending the run in the tracker."""

    def is_refusal(self, error: Exception) -> bool:
        """Tell whether an error is an answer that a retry does not change."""
        return False

    def facts(self) -> dict[str, Any]:
        """Return what the run's summary says about this tracker."""
        return {}

    def numbers(self) -> dict[str, float]:
        """Return what `stream.metrics` publishes of this feed; one thread may call this."""
        return {}

    def finish(
        self, *, status: str, artifacts: list[Path], values: dict[str, float], timeout_seconds: float = 120.0
    ) -> bool:
        """Send the rest, the final values and artifacts, and end the run; return whether all of it arrived."""
        self.begin_end(status=status, artifacts=artifacts, values=values, timeout_seconds=timeout_seconds)
        return self.wait_for_end()

    def begin_end(
        self, *, status: str, artifacts: list[Path], values: dict[str, float], timeout_seconds: float
    ) -> None:
        """Do as `finish` does, without waiting."""
        self._ending = Ending(status=status, artifacts=list(artifacts), values=values, time=time.time())
        self._deadline = time.monotonic() + timeout_seconds
        self._closing = True
        self._wake.set()
        if self.is_away:
            logger.warning("%s is unreachable; waiting at most %g s", self._title, timeout_seconds)

    def wait_for_end(self) -> bool:
        """Wait for the end that has begun; return whether everything arrived in time."""
        self._thread.join(timeout=max(self._deadline - time.monotonic(), 0.0))
        done = not self._thread.is_alive() and self._ending is None
        if not done:
            logger.warning(
                "%s did not receive everything (%s). The log of the run has it; start the run again by its name to send it",
                self._title,
                self._failure,
            )
        return done

    def abandon(self) -> None:
        """Stop without ending the run in the tracker."""
        self._is_abandoned = True
        self._wake.set()

    def num_waiting(self) -> int:
        """Return how many records of the log are not sent; one thread may call this."""
        return sum(cursor.num_waiting() for cursor in self._cursors)

    def _work(self) -> None:
        while not self._is_abandoned:
            is_last = self._closing  # read first: records written while the others were sent need one more turn
            try:
                self._send_all()
                self.is_away = False
                self._num_refusals = 0
                if is_last:
                    assert self._ending is not None
                    self.end(self._ending)
                    self._note(complete=self._ending.is_finished)
                    self._ending = None
                    return
                self.tend()
            except Exception as error:  # noqa: BLE001 (training continues, whatever fails in a tracker)
                self._is_connected = False  # the tracker may have lost what it had before the failure
                self._failure = f"{type(error).__name__}: {first_line(error)}"[:_MAX_FAILURE_LENGTH]
                is_refusal = isinstance(error, ImportError | ConfigError) or self.is_refusal(error)
                self._num_refusals = self._num_refusals + 1 if is_refusal else 0
                if not self.is_away:
                    logger.warning("%s: %s; its records stay in the log, retrying", self._title, self._failure)
                self.is_away = True
                is_final = time.monotonic() >= self._deadline or self._num_refusals > 1
                if self._closing and is_final:
                    return
            self._wake.wait(timeout=_PAUSE_SECONDS)
            self._wake.clear()
        self.leave()

    def _send_all(self) -> None:
        if not self._is_connected:
            known = self.connect()
            for cursor in self._cursors:
                cursor.continue_after(known.get(cursor.name, -1))
            self._is_connected = True
        for cursor in self._cursors:
            for records, position, num_read in cursor.batches():
                if records:
                    self.send(cursor.name, records)
                cursor.advance(records, position, num_read)

    def _known_state(self, run: Destination) -> dict[str, Any]:
        known = read_state(self._run_dir, self.state_file)
        before = known.get("run", {})
        return known if all(before.get(name) == getattr(run, name) for name in run.place) else {}

    def _note(self, **facts: Any) -> None:
        self._state |= facts
        content = json.dumps(self._state, indent=1) + "\n"
        write_file(str(self._run_dir / self.state_file), content.encode())


@dataclass(slots=True)
class _Cursor:
    """Progress of sending one kind of records."""

    run_dir: Path
    name: str
    position: Position = START
    num_sent: int = 0
    """Records before `position`."""
    sent_step: int = -1
    _seen: Position = START
    _num_seen: int = 0

    def continue_after(self, step: int) -> None:
        """Continue after the last step that the tracker has; from the start, if it lost some."""
        if step < self.sent_step:
            self.position, self.num_sent = START, 0
        self.sent_step = step

    def batches(self) -> Iterator[tuple[list[Record], Position, int]]:
        """Yield (new records, position after them, number of records read): whole steps, a limited number of values."""
        pending: list[Record] = []
        position, num_read, num_values = self.position, 0, 0
        for after, record in read_records_after(self.run_dir, self.name, self.position):
            if record["step"] > self.sent_step:
                if num_values + len(record["metrics"]) > _MAX_VALUES_PER_CALL:
                    yield pending, position, num_read
                    pending, num_read, num_values = [], 0, 0
                pending.append(record)
                num_values += len(record["metrics"])
            position, num_read = after, num_read + 1
        yield pending, position, num_read

    def advance(self, records: list[Record], position: Position, num_read: int) -> None:
        """Record that a batch has arrived."""
        if records:
            self.sent_step = records[-1]["step"]
        self.position = position
        self.num_sent += num_read

    def num_waiting(self) -> int:
        """Return how many records are not sent; reads only those that are new since the last call."""
        for position, _ in read_records_after(self.run_dir, self.name, self._seen):
            self._seen = position
            self._num_seen += 1
        return max(self._num_seen - self.num_sent, 0)


def read_state(run_dir: Path, state_file: str) -> dict[str, Any]:
    """Return the state of a feed; empty: there is none."""
    path = run_dir / state_file
    return json.loads(path.read_text()) if path.exists() else {}
