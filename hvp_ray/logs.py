"""Format of the log lines of trainers and view workers: time, level, run, process and step.

    2026-11-24 12:00:00 WARNING run=NAME rank=0 step=123 hvp_ray.stream.view_stream: view worker 1 died ...
    2026-11-24 12:00:00 WARNING run=NAME worker=view-worker-1 step=125 hvp_ray.stream.render_batch: ...

They go to the standard error of the process, which Ray keeps as a file of the session (`ray logs`). `step` counts from 0,
as requests and `attempts.jsonl` do: the record of step 123 in `metrics.jsonl` has the number 124, the steps done. Warnings
also reach the driver's terminal (`launch.board.BoardLogHandler`).
"""

import logging
import sys

PACKAGE = "hvp_ray"
LINE_FORMAT = "%(asctime)s %(levelname)s run=%(run)s %(origin)s step=%(step)s %(name)s: %(message)s"

_step: int | None = None


def note_step(step: int) -> None:
    """Set the step that this process works on, for all of its threads."""
    global _step  # as one process has one standard error
    _step = step


def set_up_logging(*, run: str, origin: str) -> None:
    """Write what `hvp_ray` logs in this process, from INFO on, in the format of this module; replaces an earlier setup.

    Args:
        run: the run's name.
        origin: the process, e.g. "rank=0" or "worker=view-worker-1".
    """
    logger = logging.getLogger(PACKAGE)
    for handler in list(logger.handlers):
        if isinstance(handler, _WorkerLogHandler):
            logger.removeHandler(handler)
    logger.addHandler(_WorkerLogHandler(run, origin))
    logger.setLevel(logging.INFO)
    # Ray Train has handlers of its own on the root. Its file of JSON lines keeps our records with these values. Its
    # console would write them a second time, so filter it.
    for handler in logging.getLogger().handlers:
        is_console = isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
        if is_console and not any(isinstance(known, _OfOthers) for known in handler.filters):
            handler.addFilter(_OfOthers())


class _WorkerLogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    def __init__(self, run: str, origin: str) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter(LINE_FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
        self.addFilter(_Origin(run, origin))


class _Origin(logging.Filter):
    """Adds run, origin and step to a record."""

    def __init__(self, run: str, origin: str) -> None:
        super().__init__()
        self._run = run
        self._origin = origin

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the values; keep every record."""
        record.run, record.origin = self._run, self._origin
        record.step = "-" if _step is None else _step
        return True


class _OfOthers(logging.Filter):
    """Keeps only the records of other packages."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the logger is outside hvp_ray."""
        return record.name != PACKAGE and not record.name.startswith(f"{PACKAGE}.")
