"""Our own numbers in Ray's metrics: what is published beside Ray's on the Prometheus port of every node.

Nobody publishes from within a step. Whoever knows numbers offers a function that reads them; one thread of each process
calls it once a second and gives the values to Ray. Ray sends them to the agent of the node every 10 s, and once more when
the process ends. Counters begin at 0 in every process (label `WorkerId`), so sum over it. A failure to read or to publish
is said once and never reaches training.

Only processes of Ray have a publisher: what trains without Ray imports none of it. `tracking/metrics.toml` has every
name and its meaning.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hvp_ray.records import BatchDraft, ViewBatch
from hvp_ray.tracking.metrics_table import TRAINER_METRICS as TRAINER_METRICS
from hvp_ray.tracking.metrics_table import WORKER_METRICS as WORKER_METRICS
from hvp_ray.tracking.metrics_table import Metric as Metric

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 1.0
"""Between two publications of one process. Ray drops a gauge that was not set for 20 s."""

_CLOSE_SECONDS = 2.0

Readings = Mapping[str, float | Sequence[float]]
"""Metric -> value: counters since the process began, gauges as they are, all observations of a histogram so far."""

ReadNumbers = Callable[[], Readings]
"""Called in the publisher's thread; must not wait for training."""

WatchNumbers = Callable[[ReadNumbers], None]
"""Takes a function to be read as long as the process trains."""

CHECKPOINT_SECONDS_BOUNDARIES = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0]


def exported_name(name: str) -> str:
    """Return the name that Prometheus sees: Ray puts its own prefix before all."""
    return f"ray_{name}"


class Instrument(Protocol):
    """Where the values of one metric go."""

    def add(self, increment: float) -> None:
        """Raise a counter; 0 makes it visible."""
        ...

    def set(self, value: float) -> None:
        """Set a gauge."""
        ...

    def observe(self, value: float) -> None:
        """Count one observation of a histogram."""
        ...


OpenInstrument = Callable[[str, Metric, Mapping[str, str]], Instrument]
"""(name, metric, tags) -> where its values go."""


class _RayInstrument:
    """An instrument of Ray; implements `Instrument`."""

    def __init__(self, name: str, metric: Metric, tags: Mapping[str, str]) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        keys = tuple(tags)
        match metric.kind:
            case "counter":
                self._metric = Counter(name, metric.meaning, tag_keys=keys)
            case "gauge":
                self._metric = Gauge(name, metric.meaning, tag_keys=keys)
            case "histogram":
                self._metric = Histogram(name, metric.meaning, CHECKPOINT_SECONDS_BOUNDARIES, tag_keys=keys)
        self._metric.set_default_tags(dict(tags))

    def add(self, increment: float) -> None:
        self._metric._record(increment)  # inc() refuses 0, and a counter that appears with 1 has no rate

    def set(self, value: float) -> None:
        self._metric.set(value)

    def observe(self, value: float) -> None:
        self._metric.observe(value)


class MetricsPublisher:
    """See the module. One for each process."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        tags: Mapping[str, str],
        *,
        open_instrument: OpenInstrument = _RayInstrument,
        interval_seconds: float = PUBLISH_SECONDS,
    ) -> None:
        self._metrics = metrics
        self._tags = dict(tags)
        self._open_instrument = open_instrument
        self._interval_seconds = interval_seconds
        self._instruments: dict[str, Instrument] = {}
        self._published: dict[str, float] = {}
        self._watched: list[_Watched] = []
        self._failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def watch(self, read: ReadNumbers, *, every_seconds: float = 0.0) -> None:
        """Publish from now on what `read` returns, at most every `every_seconds`."""
        self._watched.append(_Watched(read, every_seconds))

    def close(self) -> None:
        """Publish a last time and stop; returns within `_CLOSE_SECONDS`."""
        self._closing.set()
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _work(self) -> None:
        while True:
            is_last = self._closing.wait(self._interval_seconds)
            now = time.monotonic()
            for watched in list(self._watched):
                if is_last or now >= watched.due:
                    watched.due = now + watched.every_seconds
                    self._publish(watched.read)
            if is_last:
                return

    def _publish(self, read: ReadNumbers) -> None:
        try:
            for name, value in read().items():
                self._take(name, value)
        except Exception as error:  # noqa: BLE001 (a gap in a curve is better than a lost run)
            if not self._failed:
                logger.warning("a number was not published (%s: %s); training goes on", type(error).__name__, error)
            self._failed = True

    def _take(self, name: str, value: float | Sequence[float]) -> None:
        metric = self._metrics[name]
        if name not in self._instruments:
            self._instruments[name] = self._open_instrument(name, metric, self._tags)
        instrument, before = self._instruments[name], self._published.get(name)
        if isinstance(value, Sequence):
            for observation in value[int(before or 0) :]:
                instrument.observe(observation)
            self._published[name] = len(value)
        elif metric.kind == "gauge" and math.isfinite(value):
            instrument.set(value)
        elif metric.kind == "counter" and (before is None or value > before):
            instrument.add(value - (before or 0.0))
            self._published[name] = value


@dataclass(slots=True)
class _Watched:
    read: ReadNumbers
    every_seconds: float
    due: float = 0.0


class RenderedNumbers:
    """What one view worker has rendered."""

    def __init__(self) -> None:
        self._batches = self._views = self._unreadable_images = 0
        self._seconds = self._cpu_seconds = self._views_per_second = 0.0

    def take(self, batch: ViewBatch) -> None:
        """Count a batch."""
        groups = [group for group in (batch.global_views, batch.local_views) if group is not None]
        views = sum(group.plan.num_views * group.plan.num_images for group in groups)
        self._batches += 1
        self._views += views
        self._unreadable_images += len(batch.replacements)
        self._seconds += batch.render_seconds
        self._cpu_seconds += batch.render_cpu_seconds
        self._views_per_second = views / max(batch.render_seconds, 1e-9)

    def take_draft(self, draft: BatchDraft) -> None:
        """Count a batch that was decoded here and is rendered elsewhere."""
        self._batches += 1
        self._unreadable_images += len(draft.replacements)
        self._seconds += draft.render_seconds
        self._cpu_seconds += draft.render_cpu_seconds

    def numbers(self) -> dict[str, float]:
        """Return what is published."""
        return {
            "hvp_ray_worker_batches_total": float(self._batches),
            "hvp_ray_worker_views_total": float(self._views),
            "hvp_ray_worker_render_seconds_total": self._seconds,
            "hvp_ray_worker_render_cpu_seconds_total": self._cpu_seconds,
            "hvp_ray_worker_views_per_second": self._views_per_second,
            "hvp_ray_worker_unreadable_images_total": float(self._unreadable_images),
        }
