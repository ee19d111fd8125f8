"""Rank 0's and the other ranks' observer of the loop: journal, progress, checkpoints, collapse watch."""

import math
import time
from collections.abc import Callable

import numpy as np

from hvp_ray.config import RunConfig
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.stream.stats import StreamStats
from hvp_ray.tracking.collapse import CollapseWatch, effective_rank, embedding_std
from hvp_ray.tracking.journal import Journal, UnreadableLog
from hvp_ray.tracking.selection_log import SelectionLogWriter
from hvp_ray.tracking.selection_metrics import describe_masks, describe_pairs, describe_scores
from hvp_ray.runs.checkpoint import CheckpointStore
from hvp_ray.runs.online_knn import KnnDuringTraining
from hvp_ray.runs.progress import Progress, ReportProgress
from hvp_ray.training.step import StepMetrics
from hvp_ray.training.trainee import Trainee, take_checkpoint

_PROGRESS_SECONDS = 0.5


class RunRecorder:
    """Implements `loop.LoopObserver`."""

    def __init__(
        self,
        config: RunConfig,
        *,
        trainee: Trainee,
        store: CheckpointStore,
        stats: StreamStats,
        unreadable: UnreadableLog,
        journal: Journal | None,
        selection_log: SelectionLogWriter | None,
        knn: KnnDuringTraining | None,
        report_progress: ReportProgress,
        before_commit: Callable[[], None],
        num_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self._config = config
        self._trainee = trainee
        self._store = store
        self._stats = stats
        self._unreadable = unreadable
        self._journal = journal
        self._selection_log = selection_log
        self._knn = knn
        self._report_progress = report_progress
        self._before_commit = before_commit
        self._num_steps = num_steps
        self._steps_per_epoch = steps_per_epoch
        self.collapse = CollapseWatch()
        self._stop_requested = False
        self._started_at: float | None = None
        self._last = (time.perf_counter(), 0, 0.0)  # time, steps, waiting at the last record
        self._progress_at = 0.0
        self._steps_seen = 0
        self._steps_done = 0
        self._last_step_at = 0.0
        self._last_values: dict[str, float] = {}
        self._checkpoint_seconds: list[float] = []
        self._checkpoint_at = 0.0

    def before_step(self, batch: DeviceBatch) -> None:
        """Write down decisions on unreadable images before they take effect."""
        if self._started_at is None:
            self._started_at = time.perf_counter()
            self._last = (self._started_at, 0, self._stats.wait_seconds)
        self._unreadable.take(batch)

    def after_step(self, steps_done: int, batch: DeviceBatch, metrics: StepMetrics, learning_rate: float) -> None:
        """Record every `log_every_steps`-th step, and the first and last."""
        self._steps_seen += 1
        self._steps_done = steps_done
        self._last_step_at = time.perf_counter()
        if self._journal is None:
            return
        if self._selection_log is not None and self._selection_log.wants(steps_done):
            _log_selection(self._selection_log, steps_done, batch, metrics)
        if self._knn is not None:
            self._knn.after_step(steps_done)
        is_last = steps_done == self._num_steps
        if steps_done % self._config.tracking.log_every_steps == 0 or steps_done == 1 or is_last:
            values = self._measure(batch, metrics, steps_done)
            values["train/learning_rate"] = learning_rate
            values["train/epoch"] = steps_done / self._steps_per_epoch
            self._journal.write({"step": steps_done, "time": time.time(), "metrics": values})
            self._last_values = values
            self.collapse.see(steps_done, values)
        # Between records too: the answer says whether to stop. The loss shown is the last recorded one, which costs a GPU
        # no synchronisation.
        now = time.perf_counter()
        if now - self._progress_at >= _PROGRESS_SECONDS or is_last:
            self._progress_at = now
            loss = self._last_values["train/loss"] if self._last_values else float(metrics.loss)
            self._stop_requested = self._report_progress(self._progress(steps_done, loss))

    def save_checkpoint(self, steps_done: int) -> None:
        """Write a checkpoint, on rank 0, behind everything that it presupposes, on all ranks."""
        started_at = time.perf_counter()
        if self._selection_log is not None:
            self._selection_log.flush()
        self._before_commit()
        if self._journal is not None:
            self._store.write(take_checkpoint(self._trainee, steps_done))
            self._checkpoint_seconds.append(time.perf_counter() - started_at)
            self._checkpoint_at = time.time()

    def stop_requested(self) -> bool:
        """Tell whether the driver asked to stop; heard on rank 0, spread by the step."""
        return self._stop_requested

    def data_wait_fraction(self) -> float:
        """Share of the time since the first batch that the trainer stood still for batches."""
        if self._started_at is None:
            return 0.0
        return self._stats.wait_seconds / max(time.perf_counter() - self._started_at, 1e-9)

    def numbers(self) -> dict[str, float | list[float]]:
        """Return what `stream.metrics` publishes of this rank; any thread may ask."""
        numbers: dict[str, float | list[float]] = {
            "hvp_ray_steps_total": float(self._steps_seen),
            "hvp_ray_images_total": float(self._unreadable.num_images),
            "hvp_ray_unreadable_images_total": float(self._unreadable.num_unreadable),
        }
        if self._started_at is not None and self._steps_seen:
            seconds = max(self._last_step_at - self._started_at, 1e-9)
            numbers["hvp_ray_wait_fraction"] = self._stats.wait_seconds / seconds
            numbers["hvp_ray_progress_fraction"] = self._steps_done / self._num_steps
        if self._journal is not None:
            numbers["hvp_ray_checkpoints_total"] = float(len(self._checkpoint_seconds))
            numbers["hvp_ray_checkpoint_seconds"] = list(self._checkpoint_seconds)
        if self._checkpoint_at:
            numbers["hvp_ray_last_checkpoint_timestamp_seconds"] = self._checkpoint_at
        if self._last_values:
            numbers["hvp_ray_loss"] = self._last_values["train/loss"]
            numbers["hvp_ray_images_per_second"] = self._last_values["perf/images_per_second"]
        return numbers

    def _progress(self, steps_done: int, loss: float) -> Progress:
        assert self._started_at is not None
        seconds = max(time.perf_counter() - self._started_at, 1e-9)
        return Progress(
            steps_done=steps_done,
            num_steps=self._num_steps,
            epoch=steps_done / self._steps_per_epoch,
            loss=loss,
            images_per_second=self._steps_seen * self._config.training.images_per_step / seconds,
            data_wait_fraction=self.data_wait_fraction(),
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
        plan = batch.global_views.plan
        if metrics.selection.pair_indices is not None:
            chosen = metrics.selection.pair_indices.cpu().numpy().astype(np.int64)
            values |= describe_pairs(plan, metrics.candidates, chosen)
        if plan.mask is not None:
            views = metrics.selection.view_indices.cpu().numpy().astype(np.int64)
            values |= describe_masks(plan.mask, views)
        if metrics.scores is not None:
            values |= describe_scores(metrics.scores, metrics.selection, metrics.candidates)
        now, waited = time.perf_counter(), self._stats.wait_seconds
        last_at, last_steps, last_waited = self._last
        steps = self._steps_seen - last_steps
        seconds = max(now - last_at, 1e-9)
        self._last = (now, self._steps_seen, waited)
        values["perf/step_seconds"] = seconds / steps
        values["perf/images_per_second"] = steps * self._config.training.images_per_step / seconds
        values["perf/wait_seconds"] = (waited - last_waited) / steps
        speeds = self._stats.views_per_second_by_worker()
        if speeds:
            values["stream/views_per_second_per_worker"] = float(np.mean(list(speeds.values())))
        values["stream/bytes"] = float(self._stats.num_bytes)
        values["stream/retries"] = float(self._stats.num_retries)
        return {name: value for name, value in values.items() if math.isfinite(value)}


def _log_selection(log: SelectionLogWriter, steps_done: int, batch: DeviceBatch, metrics: StepMetrics) -> None:
    candidates, chosen = metrics.candidates, metrics.selection.pair_indices
    if chosen is None or len(candidates.pairs) < 2:
        return  # all pairs were trained on, or there was nothing to choose
    scores = metrics.scores
    log.take(
        steps_done,
        batch,
        pairs=candidates.pairs,
        chosen=chosen.cpu().numpy().astype(np.int64),
        scores=None
        if scores is None
        else scores.best_of_pairs(candidates.num_chosen_local_views).float().cpu().numpy(),
    )
