"""The k-NN during training, off the critical path: rank 0 hands over a snapshot and goes on; answers come later.

A snapshot lies in `<run>/knn_pending/` until its answer stands in `evaluations.jsonl`, so that a restart loses none. An
evaluation that fails leaves a gap in the curve and one sentence in the summary; training goes on.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

from hvp_ray.config import RunConfig
from hvp_ray.errors import first_line
from hvp_ray.evaluation.snapshot import snapshot_encoder
from hvp_ray.files import write_file
from hvp_ray.tracking.journal import Journal, read_journal, truncate_journal

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations.jsonl"


@runtime_checkable
class KnnAnswer(Protocol):
    """What is to come of one snapshot."""

    def is_ready(self) -> bool:
        """Tell, without waiting, whether `values` would return at once."""
        ...

    def values(self) -> dict[str, float]:
        """Wait for the accuracies; empty if there is nothing to evaluate on. Re-raise an error of the evaluation."""
        ...


AskKnn = Callable[[bytes], KnnAnswer]
"""Hands a snapshot over."""


class KnnDuringTraining:
    """Asks every `tracking.knn_every_epochs` epochs, and writes down what comes; made by rank 0."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        encoder: nn.Module,
        ask: AskKnn,
        problems: list[str],
        *,
        steps_per_epoch: int,
        num_steps: int,
        first_step: int,
    ) -> None:
        self._folder = run_dir / "knn_pending"
        self._encoder = encoder
        self._ask = ask
        self._problems = problems
        self._interval = config.tracking.knn_every_epochs * steps_per_epoch
        if not config.tracking.knn_images:
            self._interval = 0
        self._num_steps = num_steps
        self._pending: list[tuple[int, KnnAnswer]] = []
        truncate_journal(run_dir / EVALUATIONS, last_step=first_step)
        self._journal = Journal(run_dir / EVALUATIONS)
        answered = {record["step"] for record in read_journal(run_dir / EVALUATIONS)}
        for path in sorted(self._folder.glob("step-" + "[0-9]" * 8)):
            step = int(path.name.removeprefix("step-"))
            if step <= first_step and step not in answered:
                self._ask_for(step, path.read_bytes)
            else:
                path.unlink()
        self._has_final = num_steps in answered  # a run that was killed between this and its summary has written it
        asked = answered | {step for step, _ in self._pending}
        if first_step == 0 and 0 not in asked:  # a run that was killed before its first checkpoint has asked already
            self.after_step(0)

    def after_step(self, steps_done: int) -> None:
        """Ask where it is due; write down what has come. The final weights are evaluated at the end of the run anyway."""
        if self._interval and steps_done % self._interval == 0 and steps_done < self._num_steps:
            self._ask_for(steps_done, lambda: self._write_snapshot(steps_done))
        while self._pending and self._pending[0][1].is_ready():
            self._write_first()

    def finish(self, final: dict[str, float]) -> None:
        """Wait for what is pending, and write it and the values of the final weights down."""
        while self._pending:
            self._write_first()
        if final and not self._has_final:
            self._write(self._num_steps, final)
        self._journal.close()

    def _ask_for(self, step: int, snapshot: Callable[[], bytes]) -> None:
        try:
            self._pending.append((step, self._ask(snapshot())))
        except Exception as error:  # noqa: BLE001 (a curve with a gap is better than a lost run)
            self._note_gap(step, error)

    def _write_snapshot(self, step: int) -> bytes:
        snapshot = snapshot_encoder(self._encoder)
        write_file(str(self._path(step)), snapshot)
        return snapshot

    def _write_first(self) -> None:
        step, answer = self._pending.pop(0)
        try:
            values = answer.values()
        except Exception as error:  # noqa: BLE001 (a curve with a gap is better than a lost run)
            self._note_gap(step, error)
            return
        if values:
            self._write(step, values)
        self._path(step).unlink(missing_ok=True)

    def _note_gap(self, step: int, error: Exception) -> None:
        problem = f"the k-NN during training after step {step} failed: {type(error).__name__}: {first_line(error)}"
        logger.warning("%s; training goes on", problem)
        self._problems.append(problem)
        self._path(step).unlink(missing_ok=True)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._journal.write({"step": step, "time": time.time(), "metrics": values})

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


class AnswerAtHand:
    """An answer that was computed when it was asked for: where there is nobody else to do it."""

    def __init__(self, values: dict[str, float]) -> None:
        self._values = values

    def is_ready(self) -> bool:
        """Always."""
        return True

    def values(self) -> dict[str, float]:
        """Return the accuracies."""
        return self._values
