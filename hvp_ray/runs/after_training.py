"""Runs the parts after the last step (evaluation, figures, metrics of the cluster) so that none can lose a trained run.

`trained.json` in the run's folder marks a run whose last checkpoint and encoder are written. It holds what training
measured, and which parts were begun and survived. If the process dies, the next attempt reads it, trains no step again, and
skips a part in which the process died twice. `summary.json` marks a finished run, which a
comparison may evaluate again.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hvp_ray.errors import first_line
from hvp_ray.files import place_in, read_file, write_file

logger = logging.getLogger(__name__)

TRAINED = "trained.json"
_MAX_DEATHS_IN_PART = 2
"""One death may be the machine's fault."""
MAX_DEATHS = 3
"""After this many deaths, run only parts that survived once. Launchers grant this many restarts, so a run finishes."""

Result = TypeVar("Result")


class StopRequestedError(Exception):
    """The run was asked to stop between two parts; `trained.json` stays."""


def forgive_death(run: str) -> None:
    """Do not count a process as dead if it was stopped on request in one of the parts.

    Args:
        run: the run's folder, path or URI.
    """
    path = place_in(run, TRAINED)
    try:
        content = read_file(path)
        if content is not None:
            write_file(path, (json.dumps(json.loads(content) | {"begun": None}, indent=1) + "\n").encode())
    except (OSError, ValueError) as error:
        logger.debug("%s stays as it is: %s", path, error)


class AfterTraining:
    """Runs the parts after training; made by rank 0."""

    def __init__(
        self,
        run_dir: Path,
        summary: dict[str, Any],
        problems: list[str],
        *,
        may_continue: bool,
        keep: Callable[[], None] = lambda: None,
        is_stop_requested: Callable[[], bool] = lambda: False,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """Mark the run as trained.

        Args:
            run_dir: the run's folder.
            summary: what this attempt measured.
            problems: what failed so far, one sentence each. Failures of an earlier attempt are inserted at the front,
                later ones appended.
            may_continue: this attempt trained no step, so `trained.json` of an earlier attempt holds.
            keep: uploads `trained.json`; called after each change.
            is_stop_requested: called before each part.
            check_owner: raises if another process has taken the run over; called before each part and after it.
        """
        self._path = run_dir / TRAINED
        self._keep = keep
        self._is_stop_requested = is_stop_requested
        self._check_owner = check_owner
        known: dict[str, Any] = {}
        if may_continue and self._path.exists():
            known = json.loads(self._path.read_text())
        elif may_continue and (finished := run_dir / "summary.json").exists():
            known = {"summary": json.loads(finished.read_text())}  # evaluated again, for a comparison
        self.summary: dict[str, Any] = known.get("summary", summary)
        """Measurements of training, from the attempt that did the last step."""
        self.problems = problems
        problems[:0] = known.get("problems", [])
        self._survived: list[str] = known.get("survived", [])
        self._deaths: dict[str, int] = known.get("deaths_in_parts", {})
        begun = known.get("begun")
        if begun is not None:
            self._deaths[begun] = self._deaths.get(begun, 0) + 1
        self._write(begun=None)

    def attempt(self, part: str, work: Callable[[], Result]) -> Result | None:
        """Return the result of `work`; None with a new problem if it failed or was skipped.

        KeyboardInterrupt and SystemExit are not caught.

        Raises:
            StopRequestedError: the run was asked to stop.
        """
        if self._is_stop_requested():
            raise StopRequestedError
        here, everywhere = self._deaths.get(part, 0), sum(self._deaths.values())
        if part not in self._survived and (here >= _MAX_DEATHS_IN_PART or everywhere >= MAX_DEATHS):
            deaths = f"{here} times in it" if here >= _MAX_DEATHS_IN_PART else f"{everywhere} times after training"
            self._note(f"{part} was left out: the process died {deaths}, perhaps because memory ran out")
            return None
        self._write(begun=part)
        try:
            return work()
        except Exception as error:  # of any kind: the weights are in a checkpoint
            logger.debug("%s failed", part, exc_info=True)
            self._note(f"{part} failed: {type(error).__name__}: {first_line(error)}")
            return None
        finally:
            self._survived.append(part)
            self._write(begun=None)

    def finish(self) -> None:
        """Delete `trained.json`; `summary.json` replaces it."""
        self._path.unlink(missing_ok=True)

    def _note(self, problem: str) -> None:
        logger.warning("%s; the run continues without it", problem)
        if problem not in self.problems:  # an earlier attempt may have met it
            self.problems.append(problem)

    def _write(self, *, begun: str | None) -> None:
        self._check_owner()
        content = {
            "summary": self.summary,
            "problems": self.problems,
            "survived": self._survived,
            "begun": begun,
            "deaths_in_parts": self._deaths,
        }
        write_file(str(self._path), (json.dumps(content, indent=1) + "\n").encode())
        self._keep()
