"""The publisher publishes rarely and completely, and its failures never reach training; names follow Prometheus."""

import math
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import hvp_ray
from hvp_ray.config import config_to_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.runs.rank import build_order
from hvp_ray.selection import hard_step
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.metrics import (
    MetricsPublisher,
    Publish,
    RenderedNumbers,
)
from hvp_ray.stream.render_batch import open_render_context, render_batch
from hvp_ray.tracking.metrics_table import TRAINER_METRICS, WORKER_METRICS, Metric
from tests.helpers import tiny_config

ALL = TRAINER_METRICS | WORKER_METRICS


class _Recorded:
    """Records the values of all metrics."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.tags: set[tuple[tuple[str, str], ...]] = set()

    def open(self, name: str, metric: Metric, tags: Mapping[str, str]) -> Publish:
        self.tags.add(tuple(tags.items()))
        return self.values[name].append


def _publisher(recorded: _Recorded, interval_seconds: float) -> MetricsPublisher:
    tags = {"run": "r", "rank": "0"}
    return MetricsPublisher(ALL, tags, open_metric=recorded.open, interval_seconds=interval_seconds)


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_numbers_are_published_at_most_once_an_interval_however_often_they_change() -> None:
    recorded, steps = _Recorded(), 0
    publisher = _publisher(recorded, interval_seconds=0.1)
    publisher.watch(lambda: {"hvp_ray_steps_total": float(steps)})
    started = time.monotonic()
    while time.monotonic() - started < 0.55:
        steps += 1
    publisher.close()
    elapsed = time.monotonic() - started
    increments = recorded.values["hvp_ray_steps_total"]
    assert 2 <= len(increments) <= elapsed / 0.1 + 1  # and once more at the end
    assert sum(increments) == steps
    assert recorded.tags == {(("run", "r"), ("rank", "0"))}


def test_slow_numbers_are_read_less_often_and_at_the_end() -> None:
    recorded, reads = _Recorded(), 0

    def read() -> dict[str, float]:
        nonlocal reads
        reads += 1
        return {"hvp_ray_spilled_bytes": 0.0}

    publisher = _publisher(recorded, interval_seconds=0.01)
    publisher.watch(read, every_seconds=60.0)
    time.sleep(0.2)
    assert reads == 1
    publisher.close()
    assert reads == 2


def test_counters_begin_visibly_at_zero_and_grow_by_what_is_new_gauges_and_histograms_are_as_they_are() -> None:
    recorded = _Recorded()
    readings: dict[str, float | list[float]] = {
        "hvp_ray_steps_total": 0.0,
        "hvp_ray_loss": -0.5,
        "hvp_ray_checkpoint_seconds": [],
    }
    publisher = _publisher(recorded, interval_seconds=0.01)
    publisher.watch(lambda: dict(readings))
    _wait_for(lambda: recorded.values["hvp_ray_loss"])
    readings |= {"hvp_ray_steps_total": 3.0, "hvp_ray_loss": math.nan, "hvp_ray_checkpoint_seconds": [0.5, 0.25]}
    _wait_for(lambda: len(recorded.values["hvp_ray_checkpoint_seconds"]) == 2)
    readings |= {"hvp_ray_steps_total": 2.0, "hvp_ray_checkpoint_seconds": [0.5, 0.25, 0.75]}
    publisher.close()
    assert recorded.values["hvp_ray_steps_total"] == [0.0, 3.0]
    assert set(recorded.values["hvp_ray_loss"]) == {-0.5}
    assert recorded.values["hvp_ray_checkpoint_seconds"] == [0.5, 0.25, 0.75]


@pytest.mark.parametrize("trouble", ["reading", "unknown name", "instrument"])
def test_trouble_is_said_once_and_stays_in_the_publisher(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    recorded = _Recorded()

    def read() -> dict[str, float]:
        if trouble == "reading":
            raise RuntimeError("dictionary changed size during iteration")
        return {"hvp_ray_no_such_total" if trouble == "unknown name" else "hvp_ray_steps_total": 1.0}

    def open_metric(name: str, metric: Metric, tags: Mapping[str, str]) -> Publish:
        if trouble == "instrument" and name == "hvp_ray_steps_total":
            raise ValueError("no agent")
        return recorded.open(name, metric, tags)

    publisher = MetricsPublisher(ALL, {}, open_metric=open_metric, interval_seconds=0.01)
    publisher.watch(read)
    publisher.watch(lambda: {"hvp_ray_loss": 1.0})
    _wait_for(lambda: len(recorded.values["hvp_ray_loss"]) >= 3)
    publisher.close()
    assert len(caplog.records) == 1
    assert "training continues" in caplog.text


def test_close_does_not_wait_for_numbers_that_hang() -> None:
    release = threading.Event()

    def read() -> dict[str, float]:
        release.wait(timeout=300.0)
        return {}

    publisher = _publisher(_Recorded(), interval_seconds=0.01)
    publisher.watch(read)
    started = time.monotonic()
    publisher.close()
    assert time.monotonic() - started < 60.0
    release.set()


def test_rendered_numbers_are_those_of_the_batches() -> None:
    config = tiny_config("unused", recipe="dino-digits")
    requests = requests_of_rank(
        config, build_order(config, open_dataset(config.data)), rank=0, num_ranks=1, known_replacements={}
    )
    context = open_render_context(config_to_dict(config), "cpu")
    rendered = RenderedNumbers()
    assert set(rendered.numbers()) == set(WORKER_METRICS)
    batches = [render_batch(context, requests(step)) for step in range(2)]
    for batch in batches:
        rendered.take(batch)
    selection = config.selection
    of_step = hard_step(selection)
    views = 2 * 16 * (of_step.num_views + of_step.num_local_views)
    seconds = sum(batch.render_seconds for batch in batches)
    numbers = rendered.numbers()
    assert numbers["hvp_ray_worker_batches_total"] == 2
    assert numbers["hvp_ray_worker_views_total"] == views
    assert numbers["hvp_ray_worker_render_seconds_total"] == pytest.approx(seconds)
    assert numbers["hvp_ray_worker_views_per_second"] == pytest.approx(views / 2 / batches[1].render_seconds)
    assert numbers["hvp_ray_worker_unreadable_images_total"] == 0


def test_names_are_in_the_style_of_prometheus_and_all_are_in_use() -> None:
    for name, metric in ALL.items():
        assert re.fullmatch(r"hvp_ray_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
    used: set[str] = set()
    for path in Path(hvp_ray.__path__[0]).rglob("*.py"):
        if path.name != "metrics.py":
            used |= set(re.findall(r'"(hvp_ray_[a-z_]+)"', path.read_text()))
    assert used == set(TRAINER_METRICS)
