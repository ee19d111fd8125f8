"""The board of a run: a small Ray actor between driver and trainers.

Progress, warnings and reports of the streams go up. A stop and the roster of view workers come down.
"""

import dataclasses
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import RayError

from hvp_ray.runs.progress import Progress
from hvp_ray.stream.roster import Roster, StreamReport

_MOST_REPORTS = 10_000
"""Reports that are kept if the driver takes none."""

Value = TypeVar("Value")


class Unread(Generic[Value]):
    """A value that the board passes on without loading it.

    Loading an actor's handle imports its class, which would delay the board by seconds at the start of a run.
    """

    def __init__(self, value: Value) -> None:
        self._value: Value | None = value
        self._content: bytes | None = None

    def read(self) -> Value:
        """Return the value."""
        if self._value is None:
            assert self._content is not None
            self._value = cloudpickle.loads(self._content)
        return self._value

    def __getstate__(self) -> bytes:
        return cloudpickle.dumps(self._value) if self._content is None else self._content

    def __setstate__(self, content: bytes) -> None:
        self._value, self._content = None, content


@dataclass(slots=True)
class BoardContent:
    """Content of the board."""

    progress: Progress | None = None
    messages: list[str] = field(default_factory=list)
    """Warnings since the driver's last poll."""
    fatal: str | None = None
    """An error that would return if the trainers restarted."""
    summary: dict[str, Any] | None = None
    is_trained: bool = False
    """All steps are done, and the trainers evaluate."""
    controller: Unread[Any] | None = None
    """Handle of Ray Train's controller, which ends the trainers when it is killed."""


class RunBoard:
    """Keep the content of the board, the stop request, and what the driver and the streams exchange."""

    def __init__(self) -> None:
        self._content = BoardContent()
        self._stop = False
        self._roster: Unread[Roster] | None = None
        self._version = 0
        """Version of the published roster."""
        self._reports: deque[StreamReport] = deque(maxlen=_MOST_REPORTS)

    def post(self, **fields: Any) -> bool:
        """Set fields of the content; return whether the run shall stop."""
        self._content = dataclasses.replace(self._content, **fields)
        return self._stop

    def post_message(self, message: str) -> None:
        """Add a warning of any rank."""
        self._content.messages.append(message)

    def post_fatal(self, message: str) -> None:
        """Set the error that ends the run. The first one counts."""
        self._content.fatal = self._content.fatal or message

    def request_stop(self) -> None:
        """Ask the trainers to stop at the next step, or between two parts of the evaluation."""
        self._stop = True

    def read(self) -> BoardContent:
        """Return the content."""
        return self._content

    def take(self) -> BoardContent:
        """Return the content and remove its messages."""
        content = self._content
        self._content = dataclasses.replace(content, messages=[])
        return content

    def publish_roster(self, version: int, roster: Unread[Roster]) -> None:
        """Set the view workers that get requests."""
        self._roster, self._version = roster, version

    def read_roster(self) -> Unread[Roster] | None:
        """Return the newest roster. None: there is none yet."""
        return self._roster

    def exchange(self, report: StreamReport) -> Unread[Roster] | None:
        """Take a stream's report; return the roster if it is newer than the one that the stream follows."""
        self._reports.append(report)
        return self._roster if self._version > report.version else None

    def take_reports(self) -> list[StreamReport]:
        """Return the reports since the last call."""
        reports = list(self._reports)
        self._reports.clear()
        return reports


RunBoardActor: Any = ray.remote(num_cpus=0, max_restarts=0, enable_task_events=False)(RunBoard)


class BoardReader:
    """Polls the board, and returns in time if Ray does not answer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._answer: Any = None

    def poll(self, timeout_seconds: float) -> BoardContent | None:
        """Return the content. None: no answer yet."""
        self._answer = self._answer or self._board.take.remote()
        ready, _ = ray.wait([self._answer], timeout=timeout_seconds)
        if not ready:
            return None
        answer, self._answer = self._answer, None
        content: BoardContent = ray.get(answer)
        return content


class ProgressPoster:
    """Posts progress without waiting. The answer to one post is read at the next."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._answer: Any = None

    def __call__(self, progress: Progress) -> bool:
        """Post; return whether the run shall stop."""
        stop = False
        if self._answer is not None:
            if not ray.wait([self._answer], timeout=0)[0]:
                return False
            stop = ray.get(self._answer)
        self._answer = self._board.post.remote(progress=progress)
        return stop


class RosterPoster:
    """Sends reports of a stream and receives rosters without blocking (an `Exchange`). A later call reads the answer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._answer: Any = None

    def __call__(self, make_report: Callable[[], StreamReport] | None) -> Roster | None:
        """Return a newer roster, or send a due report once the last one is answered."""
        if self._answer is not None:
            if not ray.wait([self._answer], timeout=0)[0]:
                return None
            answer, self._answer = self._answer, None
            try:
                roster: Unread[Roster] | None = ray.get(answer)
            except RayError:  # the link was cut; the next answer has the roster
                return None
            if roster is not None:
                return roster.read()
        if make_report is not None:
            self._answer = self._board.exchange.remote(make_report())
        return None


class BoardLogHandler(logging.Handler):
    """Sends warnings of `hvp_ray` to the board, so that the user at the driver reads them."""

    def __init__(self, board: Any, prefix: str) -> None:
        super().__init__(level=logging.WARNING)
        self._board = board
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self._board.post_message.remote(f"{self._prefix}{record.levelname.lower()}: {record.getMessage()}")
