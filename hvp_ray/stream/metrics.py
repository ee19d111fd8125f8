"""Publish hvp_ray's metrics with Ray's own, on the Prometheus port of every node.

Training steps never publish. The owner of a metric offers a function that reads it; one thread per process calls it once a
second and passes the values to Ray. Ray sends them to the agent of the node every 10 s, and once more when the process ends.
Counters start at 0 in every process (label `WorkerId`), so sum over processes. A failure to read or publish is logged once
and never reaches training.

Only Ray's processes have a publisher; training without Ray imports none of it. `tracking/metrics.toml` has every
name and its meaning.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvp_ray.records import BatchDraft, ViewBatch
from hvp_ray.tracking.metrics_table import WORKER_METRICS, Metric

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 1.0
"""Interval of one process. Ray drops a gauge that was not set for 20 s."""

_CLOSE_SECONDS = 2.0

Readings = Mapping[str, float | Sequence[float]]
"""Metric -> value: a counter since the process started, a gauge as it is, all observations of a histogram so far."""

ReadMetrics = Callable[[], Readings]
"""Called in the publisher's thread; must not block on training."""

WatchMetrics = Callable[[ReadMetrics], None]
"""Registers a function that is read as long as the process trains."""

CHECKPOINT_SECONDS_BOUNDARIES = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0]


Publish = Callable[[float], None]
"""Takes the increment of a counter (0 makes it visible), the value of a gauge, or one observation of a histogram."""

OpenMetric = Callable[[str, Metric, Mapping[str, str]], Publish]
"""(name, metric, tags) -> the function that publishes its values."""


def _open_in_ray(name: str, metric: Metric, tags: Mapping[str, str]) -> Publish:
    from ray.util.metrics import Counter, Gauge, Histogram

    options: dict[str, Any] = {"description": metric.meaning, "tag_keys": tuple(tags)}
    match metric.kind:
        case "counter":
            counter = Counter(name, **options)
            counter.set_default_tags(dict(tags))
            return counter._record  # inc() refuses 0, and a counter that appears with 1 has no rate
        case "gauge":
            gauge = Gauge(name, **options)
            gauge.set_default_tags(dict(tags))
            return gauge.set
        case "histogram":
            histogram = Histogram(name, boundaries=CHECKPOINT_SECONDS_BOUNDARIES, **options)
            histogram.set_default_tags(dict(tags))
            return histogram.observe


class MetricsPublisher:
    """Publishes the metrics of one process from a thread of its own."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        tags: Mapping[str, str],
        *,
        open_metric: OpenMetric = _open_in_ray,
        interval_seconds: float = PUBLISH_SECONDS,
    ) -> None:
        self._metrics = metrics
        self._tags = dict(tags)
        self._open_metric = open_metric
        self._interval_seconds = interval_seconds
        self._publish: dict[str, Publish] = {}
        self._published: dict[str, float] = {}
        self._watched: list[_Watched] = []
        self._failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def watch(self, read: ReadMetrics, *, every_seconds: float = 0.0) -> None:
        """Publish what `read` returns from now on, at most every `every_seconds`."""
        self._watched.append(_Watched(read, every_seconds))

    def close(self) -> None:
        """Publish a last time and stop; return within `_CLOSE_SECONDS`."""
        self._closing.set()
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _work(self) -> None:
        while True:
            is_last = self._closing.wait(self._interval_seconds)
            now = time.monotonic()
            for watched in list(self._watched):
                if is_last or now >= watched.due:
                    watched.due = now + watched.every_seconds
                    self._read(watched.read)
            if is_last:
                return

    def _read(self, read: ReadMetrics) -> None:
        try:
            for name, value in read().items():
                self._take(name, value)
        except Exception as error:  # noqa: BLE001 (a gap in a curve is better than a lost run)
            if not self._failed:
                logger.warning("a metric was not published (%s: %s); training continues", type(error).__name__, error)
            self._failed = True

    def _take(self, name: str, value: float | Sequence[float]) -> None:
        metric = self._metrics[name]
        if name not in self._publish:
            self._publish[name] = self._open_metric(name, metric, self._tags)
        publish, before = self._publish[name], self._published.get(name)
        if isinstance(value, Sequence):
            for observation in value[int(before or 0) :]:
                publish(observation)
            self._published[name] = len(value)
        elif metric.kind == "gauge" and math.isfinite(value):
            publish(value)
        elif metric.kind == "counter" and (before is None or value > before):
            publish(value - (before or 0.0))
            self._published[name] = value


@dataclass(slots=True)
class _Watched:
    read: ReadMetrics
    every_seconds: float
    due: float = 0.0


class RenderedNumbers:
    """Counts what one view worker or finisher does."""

    def __init__(self) -> None:
        self._numbers = dict.fromkeys(WORKER_METRICS, 0.0)

    def take(self, batch: ViewBatch | BatchDraft) -> None:
        """Count a batch that was rendered here, or a draft that is rendered elsewhere."""
        add = {
            "hvp_ray_worker_batches_total": 1,
            "hvp_ray_worker_unreadable_images_total": len(batch.replacements),
            "hvp_ray_worker_render_seconds_total": batch.render_seconds,
            "hvp_ray_worker_render_cpu_seconds_total": batch.render_cpu_seconds,
        }
        numbers = dict(self._numbers)
        if isinstance(batch, ViewBatch):
            views = batch.num_rendered_views
            add["hvp_ray_worker_views_total"] = views
            numbers["hvp_ray_worker_views_per_second"] = views / max(batch.render_seconds, 1e-9)
        self._numbers = numbers | {name: numbers[name] + value for name, value in add.items()}

    def numbers(self) -> dict[str, float]:
        """Return the metrics; any thread may call it."""
        return self._numbers
