"""Records a run while it trains. Every rank logs its decisions on images; rank 0 records everything else."""

import math
import time
from types import TracebackType
from typing import Any

import numpy as np
import torch

from hvp_ray.config import RunConfig
from hvp_ray.distributed.world import mean_over_ranks
from hvp_ray.errors import CheckpointError
from hvp_ray.runs.checkpoint import CheckpointWriter, PartWriter
from hvp_ray.runs.online_knn import KnnDuringTraining, join_snapshot
from hvp_ray.runs.opened_rank import OpenedRank, RankServices, RestoredRank
from hvp_ray.runs.progress import Progress, RunSteps
from hvp_ray.runs.storage import RunStorage
from hvp_ray.selection import selection_at
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.tracking.collapse import CollapseWatch, effective_rank, embedding_std
from hvp_ray.tracking.run_log import METRICS
from hvp_ray.tracking.selection_log import SelectionLogWriter
from hvp_ray.tracking.selection_metrics import describe_masks, describe_pairs, describe_scores
from hvp_ray.tracking.trackers import (
    FINISH_SECONDS,
    abandon_feeds,
    final_artifacts,
    final_values,
    finish_feeds,
    start_feeds,
)
from hvp_ray.training.step import StepMetrics
from hvp_ray.training.trainee import take_checkpoint

_PROGRESS_SECONDS = 0.5

Numbers = dict[str, float | list[float]]


class RankRecorder:
    """The recorder of all ranks but 0, and base of rank 0's; implements `loop.LoopObserver`. A context manager."""

    def __init__(self, rank: OpenedRank, restored: RestoredRank, services: RankServices) -> None:
        self._rank = rank
        self._restored = restored
        self._clock = restored.clock
        self._num_steps = restored.steps.num_steps
        self._steps_done = 0
        self._has_state = restored.trainee.is_sharded or rank.world.rank == 0
        self._writer = CheckpointWriter(rank.checkpoints)
        if restored.trainee.is_sharded:
            self._writer = PartWriter(rank.checkpoints, rank.world, rank.device)
        if restored.steps.first_step == 0:
            self._join_snapshot(0)
        services.watch_metrics(self.numbers)

    def __enter__(self) -> "RankRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Commit the last checkpoint."""
        try:
            self._writer.close(has_failed=error is not None)
        except Exception as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def before_step(self, batch: DeviceBatch) -> None:
        """Log decisions on unreadable images before they take effect."""
        self._clock.start_step()
        self._restored.unreadable.take(batch)

    def after_step(self, steps_done: int, batch: DeviceBatch, metrics: StepMetrics, learning_rate: float) -> None:
        """Count the step."""
        self._clock.end_step()
        self._steps_done = steps_done
        self._writer.check()
        if self._rank.claim is not None:
            self._rank.claim.raise_if_lost()
        self._join_snapshot(steps_done)

    def save_checkpoint(self, steps_done: int) -> None:
        """Start to write the state of this rank, once all ranks have uploaded what the checkpoint presupposes.

        The run's last checkpoint is committed on return.
        """
        self._restored.log.start_segment(steps_done)
        push_on_all_ranks(self._rank.storage, self._rank.job.run_uri, self._rank.device)
        if self._has_state:
            self._writer.wait()  # one copy of the state at a time
            self._writer.write(take_checkpoint(self._restored.trainee, steps_done))
        if steps_done == self._num_steps:
            self._writer.wait()  # no failure of the evaluation may lose the weights

    def _join_snapshot(self, steps_done: int) -> None:
        trainee, steps = self._restored.trainee, self._restored.steps
        if trainee.is_sharded and self._rank.world.rank != 0:
            join_snapshot(trainee.method.encoder, steps_done, _knn_interval(self._rank.job.config, steps), steps)

    def stop_requested(self) -> bool:
        """Tell whether this rank was asked to stop; the step shares the answer with all ranks."""
        return False

    def numbers(self) -> Numbers:
        """Return what `stream.metrics` publishes of this rank; any thread may call this."""
        unreadable = self._restored.unreadable
        numbers: Numbers = {
            "hvp_ray_steps_total": float(self._clock.num_steps),
            "hvp_ray_images_total": float(unreadable.num_images),
            "hvp_ray_unreadable_images_total": float(unreadable.num_unreadable),
        }
        if self._clock.num_steps:
            numbers["hvp_ray_wait_fraction"] = self._clock.wait_fraction
            numbers["hvp_ray_progress_fraction"] = self._steps_done / self._num_steps
        return numbers


class RunRecorder(RankRecorder):
    """The recorder of rank 0: metrics, trackers, k-NN during training, progress, checkpoints, collapse watch."""

    def __init__(self, rank: OpenedRank, restored: RestoredRank, services: RankServices) -> None:
        config, steps = rank.job.config, restored.steps
        self._config = config
        self._report_progress = services.report_progress
        self._steps_per_epoch = steps.steps_per_epoch
        self._stats = restored.stream.stats
        self.collapse = CollapseWatch(max_steps=config.training.max_collapsed_steps)
        self.problems: list[str] = []
        """Failures so far, one sentence each."""
        self._selection_log = SelectionLogWriter(
            restored.log, config, run_name=rank.job.run_name, steps_per_epoch=steps.steps_per_epoch
        )
        self._knn = KnnDuringTraining(
            restored.log,
            restored.trainee.method.encoder,
            services.submit_knn,
            self.problems,
            interval=_knn_interval(config, steps),
            steps=steps,
        )
        # States are uploaded at once: an attempt that finds no ids creates a second run in the tracker.
        self._feeds = start_feeds(rank.job.trackers, rank.job.run_dir, keep_state=rank.storage.push_file)
        self._is_finished = False
        self._last_record: tuple[float, int, float] | None = None  # time, steps, seconds of waiting
        self._progress_at = 0.0
        self._last_values: dict[str, float] = {}
        self._checkpoint_seconds: list[float] = []
        self._is_stop_requested = False
        super().__init__(rank, restored, services)  # last, because it publishes `numbers`

    def after_step(self, steps_done: int, batch: DeviceBatch, metrics: StepMetrics, learning_rate: float) -> None:
        """Record every `log_every_steps`-th step, the first and last, and the first hard step since the last of these."""
        super().after_step(steps_done, batch, metrics, learning_rate)
        if self._selection_log.wants(steps_done):
            _log_selection(self._selection_log, steps_done, batch, metrics)
        self._knn.after_step(steps_done)
        is_last = steps_done == self._num_steps
        is_regular = steps_done % self._config.tracking.log_every_steps == 0 or steps_done == 1 or is_last
        if is_regular or self._is_first_hard_step(steps_done):
            values = self._measure(batch, metrics, steps_done)
            if is_regular:
                values |= self._measure_speed()
            values["train/learning_rate"] = learning_rate
            values["train/epoch"] = steps_done / self._steps_per_epoch
            self._restored.log.write(METRICS, {"step": steps_done, "time": time.time(), "metrics": values})
            self._last_values |= values
            self.collapse.see(steps_done, values)
        # Post between records too: the answer carries a stop request. The last recorded loss costs no synchronisation.
        now = time.perf_counter()
        if now - self._progress_at >= _PROGRESS_SECONDS or is_last:
            self._progress_at = now
            loss = self._last_values["train/loss"] if self._last_values else float(metrics.loss)
            self._is_stop_requested = self._report_progress(self._progress(steps_done, loss))

    def save_checkpoint(self, steps_done: int) -> None:
        """Write the choices since the last checkpoint, then start to write this one."""
        started_at = time.perf_counter()
        self._selection_log.flush()
        super().save_checkpoint(steps_done)
        self._checkpoint_seconds.append(time.perf_counter() - started_at)

    def stop_requested(self) -> bool:
        """Tell whether the driver asked to stop."""
        return self._is_stop_requested

    def numbers(self) -> Numbers:
        """Return what `stream.metrics` publishes of rank 0; any thread may call this."""
        numbers: Numbers = super().numbers() | {
            "hvp_ray_checkpoints_total": float(self._writer.num_written),
            "hvp_ray_checkpoint_seconds": list(self._checkpoint_seconds),
        }
        if self._writer.written_at:
            numbers["hvp_ray_last_checkpoint_timestamp_seconds"] = self._writer.written_at
        if self._last_values:
            numbers["hvp_ray_loss"] = self._last_values["train/loss"]
        if "perf/images_per_second" in self._last_values:  # after a resume, a hard step may be recorded first
            numbers["hvp_ray_images_per_second"] = self._last_values["perf/images_per_second"]
        for feed in self._feeds:
            numbers |= feed.numbers()
        return numbers

    def complete_log(self, summary: dict[str, Any]) -> None:
        """Log the answers of the k-NN that are still out, and that of the final weights."""
        final = {f"eval/{name}": summary[name] for name in ("knn_top1", "knn5shot_top1")}
        self._knn.finish({name: value for name, value in final.items() if value is not None})

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """End the run in all trackers; return its ids there."""
        self._is_finished = True
        finish_feeds(
            self._feeds,
            status="FINISHED",
            artifacts=final_artifacts(self._rank.job.run_dir),
            values=final_values(summary),
            timeout_seconds=FINISH_SECONDS,
        )
        ids: dict[str, Any] = {"mlflow_run_id": None}
        for feed in self._feeds:
            ids |= feed.facts()
        return ids

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Commit the last checkpoint, and end the run in all trackers if it stopped or failed and goes on nowhere else."""
        has_failed = True
        try:
            super().__exit__(kind, error, traceback)
            has_failed = error is not None
        finally:
            if self._is_finished:
                pass
            elif self._rank.claim is not None and self._rank.claim.is_lost():
                abandon_feeds(self._feeds)
            else:
                status, patience = ("FAILED", 5.0) if has_failed else ("KILLED", 1.0)
                finish_feeds(self._feeds, status=status, timeout_seconds=patience)

    def _is_first_hard_step(self, steps_done: int) -> bool:
        """Tell whether a step is hard and no recorded one since the last multiple of `log_every_steps` was.

        Without these steps, a run with `selection.every=2` and `log_every_steps=10` would record random steps only.
        """
        interval = self._config.tracking.log_every_steps
        recorded = max(1, (steps_done - 1) // interval * interval)
        return self._is_hard(steps_done) and not any(map(self._is_hard, range(recorded, steps_done)))

    def _is_hard(self, steps_done: int) -> bool:
        return selection_at(self._config.selection, steps_done - 1, self._num_steps).is_hard

    def _progress(self, steps_done: int, loss: float) -> Progress:
        return Progress(
            first_step=self._restored.steps.first_step,
            steps_done=steps_done,
            num_steps=self._num_steps,
            epoch=steps_done / self._steps_per_epoch,
            loss=loss,
            images_per_second=self._clock.num_steps * self._config.training.images_per_step / self._clock.seconds,
            data_wait_fraction=self._clock.wait_fraction,
        )

    def _measure(self, batch: DeviceBatch, metrics: StepMetrics, steps_done: int) -> dict[str, float]:
        values = {"train/loss": float(metrics.loss)}
        if metrics.gradient_norm is not None:
            values["train/gradient_norm"] = float(metrics.gradient_norm)
        values["collapse/embedding_std"] = float(embedding_std(metrics.embeddings))
        is_tenth = steps_done % (10 * self._config.tracking.log_every_steps) == 0
        if is_tenth or steps_done in (1, self._num_steps):
            values["collapse/effective_rank"] = float(effective_rank(metrics.embeddings.cpu()))
        values |= {name: float(value) for name, value in metrics.measurements.items()}
        has_choice = self._is_hard(steps_done) or self._config.selection.rule == "first"
        values |= _describe_selection(batch, metrics, has_choice=has_choice)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _measure_speed(self) -> dict[str, float]:
        """Return the means since the last call."""
        last_time, last_steps, last_waited = self._last_record or (self._clock.started_at, 0, 0.0)
        now, steps_here, waited = time.perf_counter(), self._clock.num_steps, self._stats.wait_seconds
        self._last_record = (now, steps_here, waited)
        seconds, steps = max(now - last_time, 1e-9), steps_here - last_steps
        values = {
            "perf/step_seconds": seconds / steps,
            "perf/images_per_second": steps * self._config.training.images_per_step / seconds,
            "perf/wait_seconds": (waited - last_waited) / steps,
            "stream/bytes": float(self._stats.num_bytes),
            "stream/retries": float(self._stats.num_retries),
        }
        if self._stats.num_workers:
            values["stream/view_workers"] = float(self._stats.num_workers)
        speeds = self._stats.views_per_second_by_worker()
        if speeds:
            values["stream/views_per_second_per_worker"] = float(np.mean(list(speeds.values())))
        return values


def _knn_interval(config: RunConfig, steps: RunSteps) -> int:
    return config.tracking.knn_every_epochs * steps.steps_per_epoch if config.tracking.knn_images else 0


def _describe_selection(batch: DeviceBatch, metrics: StepMetrics, *, has_choice: bool) -> dict[str, float]:
    """Return the metrics of the chosen views. Random steps of a run with hard ones chose no pair (`has_choice`)."""
    plan, values = batch.global_views.plan, dict[str, float]()
    if metrics.selection.pair_indices is not None and has_choice:
        chosen = metrics.selection.pair_indices.cpu().numpy().astype(np.int64)
        values |= describe_pairs(plan, metrics.candidates, chosen)
    if plan.mask is not None:
        views = metrics.selection.view_indices.cpu().numpy().astype(np.int64)
        values |= describe_masks(plan.mask, views)
    if metrics.scores is not None:
        values |= describe_scores(metrics.scores, metrics.selection, metrics.candidates)
    return values


def _log_selection(log: SelectionLogWriter, steps_done: int, batch: DeviceBatch, metrics: StepMetrics) -> None:
    candidates, chosen, scores = metrics.candidates, metrics.selection.pair_indices, metrics.scores
    if chosen is None or len(candidates.pairs) < 2:
        return  # all pairs were trained on, or there was nothing to choose
    scores_BP, locals_BPL = None, None
    if scores is not None:
        scores_BP = scores.best_of_pairs(candidates.num_chosen_local_views).float().cpu().numpy()
        locals_BPL = None if scores.locals_BPL is None else scores.locals_BPL.float().cpu().numpy()
    log.take(
        steps_done,
        batch,
        pairs=candidates.pairs,
        chosen=chosen.cpu().numpy().astype(np.int64),
        scores=scores_BP,
        local_scores=locals_BPL,
    )


def push_on_all_ranks(storage: RunStorage, run_uri: str | None, device: torch.device) -> None:
    """Upload what a checkpoint presupposes; every rank returns when all have done so.

    Raises:
        CheckpointError: on all ranks, if one of them failed.
    """
    if run_uri is None:
        return
    failure: CheckpointError | None = None
    try:
        storage.push()
    except CheckpointError as error:
        failure = error
    num_failed = mean_over_ranks(torch.tensor(float(failure is not None), device=device))
    if failure is not None:
        raise failure
    if float(num_failed) > 0.0:
        raise CheckpointError(f"another trainer could not write to {run_uri}; no checkpoint was written")
