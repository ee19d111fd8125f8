"""Statistics of a stream. Each field states its unit and how to act on it."""

import statistics
from dataclasses import dataclass, field

from hvp_ray.records import ViewBatch

_RECENT_BATCHES = 32


@dataclass(kw_only=True, slots=True)
class StreamStats:
    """Counters of one trainer's stream. Only the stream updates them."""

    num_workers: int = 0
    """View workers that get requests; 0: the trainer renders."""

    num_batches: int = 0
    """Batches that the trainer took."""

    num_bytes: int = 0
    """Bytes of pixels that view workers sent over the link: views, or decoded images (`cluster.ship`)."""

    first_batch_seconds: float = 0.0
    """Seconds from the first request to the first batch on the device: workers start and render. Not counted as waiting."""

    wait_seconds: float = 0.0
    """Seconds that the trainer waited for batches, without the first. If they exceed a few percent of the run, use more view
    workers, or more batches in flight if waits are rare and long."""

    num_retries: int = 0
    """Requests retried, because an actor died or was late, or an object was lost."""

    num_worker_deaths: int = 0
    """Calls that ended with the death of an actor. A few mean lost nodes; if there are many, check memory."""

    num_isolations: int = 0
    """Batches searched for images that crash the decoder, because they were in flight at several deaths."""

    render_cpu_seconds: float = 0.0
    """CPU seconds that workers spent on the batches that arrived."""

    worker_seconds: float = 0.0
    """Wall time that view workers spent on the batches that arrived, without view finishers."""

    views: int = 0
    """Views that arrived."""

    render_seconds_by_worker: dict[str, float] = field(default_factory=dict)
    """Wall time of rendering, by worker."""

    views_by_worker: dict[str, int] = field(default_factory=dict)
    """Views that arrived, by worker."""

    recent_render_seconds: list[float] = field(default_factory=list)
    """Seconds from request to arrival of the last batches; lateness is measured against them."""

    def record_arrival(self, batch: ViewBatch, seconds: float) -> None:
        """Count a batch that arrived `seconds` after its request."""
        worker, num_views = batch.worker, batch.num_rendered_views
        self.views += num_views
        self.num_bytes += batch.shipped_bytes
        self.render_cpu_seconds += batch.render_cpu_seconds
        self.worker_seconds += batch.render_seconds - batch.finish_seconds
        self.views_by_worker[worker] = self.views_by_worker.get(worker, 0) + num_views
        seconds_before = self.render_seconds_by_worker.get(worker, 0.0)
        self.render_seconds_by_worker[worker] = seconds_before + batch.render_seconds
        self.recent_render_seconds = [*self.recent_render_seconds[-_RECENT_BATCHES + 1 :], seconds]

    def record_wait(self, seconds: float, *, since_start: float | None = None) -> None:
        """Count a batch that the trainer took after waiting for `seconds`.

        Args:
            seconds: seconds of waiting.
            since_start: seconds since the first request; None: as many as `seconds`.
        """
        if self.num_batches == 0:
            self.first_batch_seconds = seconds if since_start is None else since_start
        else:
            self.wait_seconds += seconds
        self.num_batches += 1

    def views_per_second_by_worker(self) -> dict[str, float]:
        """Return the speed of each worker while it renders, in views per second."""
        return {
            worker: self.views_by_worker[worker] / seconds
            for worker, seconds in self.render_seconds_by_worker.items()
            if seconds > 0.0
        }

    def typical_seconds(self) -> float | None:
        """Return the median time from request to arrival; None before the first arrival."""
        return statistics.median(self.recent_render_seconds) if self.recent_render_seconds else None
