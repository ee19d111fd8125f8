"""The board of a run: a tiny Ray actor between driver and trainers. Progress and warnings go up, a stop comes down."""

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

import ray

from hvp_ray.runs.progress import Progress


@dataclass(slots=True)
class BoardContent:
    """What the driver reads."""

    progress: Progress | None = None
    messages: list[str] = field(default_factory=list)
    """Warnings since the last look."""
    fatal: str | None = None
    """An error that starting again does not mend."""
    summary: dict[str, Any] | None = None
    is_trained: bool = False
    """All steps are done; the trainers evaluate."""


class RunBoard:
    """See the module."""

    def __init__(self) -> None:
        self._content = BoardContent()
        self._stop = False
        self._controller: Any = None

    def post_progress(self, progress: Progress) -> bool:
        """Take progress from rank 0; return whether the run shall stop."""
        self._content.progress = progress
        return self._stop

    def post_evaluation(self) -> bool:
        """Take from rank 0 that it evaluates; return whether the run shall stop."""
        self._content.is_trained = True
        return self._stop

    def post_message(self, message: str) -> None:
        """Take a warning from any rank."""
        self._content.messages.append(message)

    def post_fatal(self, message: str) -> None:
        """Take an error from any rank; the first one counts."""
        self._content.fatal = self._content.fatal or message

    def post_summary(self, summary: dict[str, Any]) -> None:
        """Take the summary from rank 0."""
        self._content.summary = summary

    def request_stop(self) -> None:
        """Ask the trainers to stop at the next step, or between two parts of the evaluation."""
        self._stop = True

    def post_controller(self, controller: Any) -> None:
        """Take the handle of Ray Train's controller from the controller itself."""
        self._controller = controller

    def read_controller(self) -> Any:
        """Return the handle of Ray Train's controller; None: it has not started."""
        return self._controller

    def read_fatal(self) -> str | None:
        """Return the error that ended the run, if there is one."""
        return self._content.fatal

    def read(self) -> BoardContent:
        """Return what is there; messages are handed out once."""
        content = self._content
        self._content = dataclasses.replace(content, messages=[])
        return content


RunBoardActor: Any = ray.remote(num_cpus=0, max_restarts=0, enable_task_events=False)(RunBoard)


class BoardLogHandler(logging.Handler):
    """Sends warnings of `hvp_ray` to the board, so that they reach the person at the driver."""

    def __init__(self, board: Any, prefix: str) -> None:
        super().__init__(level=logging.WARNING)
        self._board = board
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self._board.post_message.remote(f"{self._prefix}{record.levelname.lower()}: {record.getMessage()}")
