"""Statistics of the stream. Each field says its unit and what to do about it."""

import statistics
from dataclasses import dataclass, field

from hvp_ray.records import ViewBatch

_RECENT_BATCHES = 32


@dataclass(kw_only=True, slots=True)
class StreamStats:
    """Counters of one trainer's stream; updated by the stream only."""

    num_batches: int = 0
    """Batches handed to the trainer."""

    num_bytes: int = 0
    """Bytes of pixels that view workers sent: of views, or of decoded images (`cluster.ship`). What the link carries."""

    first_batch_seconds: float = 0.0
    """From the first request to the first batch on the device: start of workers and first rendering. Not counted as
    waiting."""

    wait_seconds: float = 0.0
    """Time that the trainer stood still for a batch, without the first. Above a few percent of the run: more view
    workers, or more batches in flight if waits are rare and long."""

    num_retries: int = 0
    """Batches that were asked again, because a worker died, was late, or an object was lost."""

    num_worker_deaths: int = 0
    """Calls that ended with the death of a worker. A few are nodes that went away; many: look for memory."""

    num_isolations: int = 0
    """Positions that were rendered image by image, because they were in flight at several deaths."""

    render_cpu_seconds: float = 0.0
    """CPU time that workers spent on the batches that arrived."""

    views: int = 0
    """Views that arrived."""

    render_seconds_by_worker: dict[str, float] = field(default_factory=dict)
    """Wall time of rendering of each worker."""

    views_by_worker: dict[str, int] = field(default_factory=dict)
    """Views of each worker."""

    recent_render_seconds: list[float] = field(default_factory=list)
    """Seconds from request to arrival of the last batches; what "late" is measured against."""

    def record_arrival(self, batch: ViewBatch, seconds: float) -> None:
        """Count a batch that arrived `seconds` after it was asked for."""
        num_views = batch.global_views.plan.num_views * batch.global_views.plan.num_images
        if batch.local_views is not None:
            num_views += batch.local_views.plan.num_views * batch.local_views.plan.num_images
        self.views += num_views
        self.num_bytes += batch.shipped_bytes
        self.render_cpu_seconds += batch.render_cpu_seconds
        self.views_by_worker[batch.worker] = self.views_by_worker.get(batch.worker, 0) + num_views
        seconds_before = self.render_seconds_by_worker.get(batch.worker, 0.0)
        self.render_seconds_by_worker[batch.worker] = seconds_before + batch.render_seconds
        self.recent_render_seconds = [*self.recent_render_seconds[-_RECENT_BATCHES + 1 :], seconds]

    def record_wait(self, seconds: float, *, since_start: float | None = None) -> None:
        """Count a batch taken by the trainer after it stood still for `seconds`.

        Args:
            seconds: of waiting.
            since_start: seconds since the first request; None: the same as `seconds`.
        """
        if self.num_batches == 0:
            self.first_batch_seconds = seconds if since_start is None else since_start
        else:
            self.wait_seconds += seconds
        self.num_batches += 1

    def views_per_second_by_worker(self) -> dict[str, float]:
        """Return each worker's speed while it renders, views / second."""
        return {
            worker: self.views_by_worker[worker] / seconds
            for worker, seconds in self.render_seconds_by_worker.items()
            if seconds > 0.0
        }

    def typical_seconds(self) -> float | None:
        """Return the median time from request to arrival; None before the first arrival."""
        return statistics.median(self.recent_render_seconds) if self.recent_render_seconds else None
