"""The k-NN during training, off the critical path: rank 0 submits a snapshot and continues; answers come later.

A snapshot stays in `<run>/knn_pending/` until its answer is in the log, so that a restart loses none. An evaluation that
fails leaves a gap in the curve and one sentence in the summary; training continues.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from torch import nn

from hvp_ray.distributed.shard import whole
from hvp_ray.errors import first_line
from hvp_ray.evaluation.snapshot import snapshot_encoder
from hvp_ray.files import write_file
from hvp_ray.runs.progress import RunSteps
from hvp_ray.tracking.run_log import EVALUATIONS, RunLog, read_records

logger = logging.getLogger(__name__)


SubmitKnn = Callable[[bytes], Future[dict[str, float]]]
"""Submits a snapshot for evaluation; returns its future accuracies, empty if there is nothing to evaluate on."""


def _is_due(steps_done: int, interval: int, steps: RunSteps) -> bool:
    """Tell whether a snapshot is evaluated after so many steps; all ranks give the same answer."""
    return interval > 0 and steps_done % interval == 0 and steps_done < steps.num_steps


def join_snapshot(encoder: nn.Module, steps_done: int, interval: int, steps: RunSteps) -> None:
    """Take part in gathering a sharded encoder on another rank than 0, if a snapshot is due."""
    if _is_due(steps_done, interval, steps):
        for tensor in encoder.state_dict().values():
            whole(tensor)


class KnnDuringTraining:
    """Evaluates a snapshot at regular steps and logs the answers; made by rank 0."""

    def __init__(
        self,
        log: RunLog,
        encoder: nn.Module,
        ask: SubmitKnn,
        problems: list[str],
        *,
        interval: int,
        steps: RunSteps,
    ) -> None:
        """Resubmit the snapshots that an earlier attempt left without an answer.

        Args:
            log: takes the answers.
            encoder: being trained. If it is sharded, other ranks call `join_snapshot` whenever a snapshot is due, also
                after step 0.
            ask: evaluates snapshots.
            problems: gets a sentence about each evaluation that fails.
            interval: steps between two snapshots; 0: none.
            steps: steps of the run.
        """
        self._folder = log.run_dir / "knn_pending"
        self._log = log
        self._encoder = encoder
        self._ask = ask
        self._problems = problems
        self._interval = interval
        self._steps = steps
        self._pending: list[tuple[int, Future[dict[str, float]]]] = []
        answered = {record["step"] for record in read_records(log.run_dir, EVALUATIONS)}
        for path in sorted(self._folder.glob("step-" + "[0-9]" * 8)):
            step = int(path.name.removeprefix("step-"))
            if step <= steps.first_step and step not in answered:
                self._submit(step, path.read_bytes)
            else:
                path.unlink()
        self._has_final = steps.num_steps in answered  # logged by a run that was killed before its summary
        submitted = answered | {step for step, _ in self._pending}
        if _is_due(0, interval, steps) and steps.first_step == 0:
            snapshot = snapshot_encoder(encoder)
            if 0 not in submitted:  # else an attempt that died before its first checkpoint submitted it
                self._submit(0, lambda: self._keep(0, snapshot))

    def after_step(self, steps_done: int) -> None:
        """Submit a snapshot if one is due; log the answers that arrived. The final weights are evaluated after training."""
        if _is_due(steps_done, self._interval, self._steps):
            snapshot = snapshot_encoder(self._encoder)
            self._submit(steps_done, lambda: self._keep(steps_done, snapshot))
        while self._pending and self._pending[0][1].done():
            self._write_first()

    def finish(self, final: dict[str, float]) -> None:
        """Wait for the pending answers; log them and the values of the final weights."""
        while self._pending:
            self._write_first()
        if final and not self._has_final:
            self._write(self._steps.num_steps, final)

    def _submit(self, step: int, snapshot: Callable[[], bytes]) -> None:
        try:
            self._pending.append((step, self._ask(snapshot())))
        except Exception as error:  # noqa: BLE001 (a curve with a gap is better than a lost run)
            self._note_gap(step, error)

    def _keep(self, step: int, snapshot: bytes) -> bytes:
        write_file(str(self._path(step)), snapshot)
        return snapshot

    def _write_first(self) -> None:
        step, answer = self._pending.pop(0)
        try:
            values = answer.result()
        except Exception as error:  # noqa: BLE001 (a curve with a gap is better than a lost run)
            self._note_gap(step, getattr(error, "cause", error))  # Ray wraps an actor's error
            return
        if values:
            self._write(step, values)
        self._path(step).unlink(missing_ok=True)

    def _note_gap(self, step: int, error: Exception) -> None:
        problem = f"the k-NN during training after step {step} failed: {type(error).__name__}: {first_line(error)}"
        logger.warning("%s; training continues", problem)
        self._problems.append(problem)
        self._path(step).unlink(missing_ok=True)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._log.write(EVALUATIONS, {"step": step, "time": time.time(), "metrics": values})

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"
