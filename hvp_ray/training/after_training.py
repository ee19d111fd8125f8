"""What follows the last step: evaluation, figures, metrics of the cluster. None of it can lose a trained run.

`trained.json` in the run's folder marks a run whose last checkpoint and encoder are written. It holds what training
measured, and which parts of the rest were begun and survived. If the process dies, the next attempt reads it: no step is
trained again, and after repeated deaths only what was survived before is done. `summary.json` alone says that a run has
finished.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hvp_ray.errors import first_line
from hvp_ray.remote_files import write_file

logger = logging.getLogger(__name__)

TRAINED = "trained.json"
_MAX_DEATHS = 2
"""One death may be the machine's, which was taken away. Two are the fewest restarts that a launcher grants."""

Result = TypeVar("Result")


class AfterTraining:
    """Runs the parts that follow training; made by rank 0."""

    def __init__(
        self,
        run_dir: Path,
        summary: dict[str, Any],
        problems: list[str],
        *,
        may_continue: bool,
        keep: Callable[[], None] = lambda: None,
    ) -> None:
        """Mark the run as trained.

        Args:
            run_dir: the run's folder.
            summary: what this attempt measured.
            problems: what failed so far, one sentence each. What fails later is appended, and what failed in an earlier
                attempt is put in front.
            may_continue: this attempt did no step, so the marker of an earlier attempt holds.
            keep: called when the marker was written, to upload it.
        """
        self._path = run_dir / TRAINED
        self._keep = keep
        known: dict[str, Any] = {}
        if may_continue and self._path.exists():
            known = json.loads(self._path.read_text())
        self.summary: dict[str, Any] = known.get("summary", summary)
        """What training measured, in the attempt that did the last step."""
        self.problems = problems
        problems[:0] = known.get("problems", [])
        self._survived: list[str] = known.get("survived", [])
        self._deaths: int = known.get("deaths", 0) + (known.get("begun") is not None)
        self._write(begun=None)

    def attempt(self, part: str, work: Callable[[], Result]) -> Result | None:
        """Return what `work` returns, or None with a new problem if it failed or was left out.

        KeyboardInterrupt and SystemExit pass.
        """
        if self._deaths >= _MAX_DEATHS and part not in self._survived:
            deaths = f"the process died {self._deaths} times after training, perhaps because memory ran out"
            self._note(f"{part} was left out: {deaths}")
            return None
        self._write(begun=part)
        try:
            return work()
        except Exception as error:  # whatever it is, the weights are safe
            logger.debug("%s failed", part, exc_info=True)
            self._note(f"{part} failed: {type(error).__name__}: {first_line(error)}")
            return None
        finally:
            self._survived.append(part)
            self._write(begun=None)

    def finish(self) -> None:
        """Delete the marker; `summary.json` takes its place."""
        self._path.unlink(missing_ok=True)

    def _note(self, problem: str) -> None:
        logger.warning("%s; the run goes on without it", problem)
        if problem not in self.problems:  # an earlier attempt may have met it
            self.problems.append(problem)

    def _write(self, *, begun: str | None) -> None:
        content = {
            "summary": self.summary,
            "problems": self.problems,
            "survived": self._survived,
            "begun": begun,
            "deaths": self._deaths,
        }
        write_file(str(self._path), (json.dumps(content, indent=1) + "\n").encode())
        self._keep()
