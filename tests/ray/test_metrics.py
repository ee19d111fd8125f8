"""Metrics on Ray's metrics port and lines in the workers' logs agree with the summary and the journal."""

import json
import os
import re
import signal
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from hvp_ray.config import config_to_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.runs.rank import build_order
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.view_worker import ViewWorkerActor
from hvp_ray.tracking.metrics_table import TRAINER_METRICS, WORKER_METRICS
from tests.helpers import tiny_config
from tests.ray.runs import AtStep, launch_quietly, processes_titled
from tests.waiting import wait_until

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_session")]

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING|ERROR) run=(\S+) (rank=\d+|worker=\S+) step=(\d+|-) hvp_ray[\w.]*: .+"
)


def _scrape(run: str) -> dict[str, dict[str, float]]:
    """Return the samples of a run from every node, summed over processes: metric -> rank or worker -> value."""
    values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        for sample in (sample for family in families for sample in family.samples):
            if sample.labels.get("run") == run and sample.name.startswith("ray_hvp_ray_"):
                values[sample.name][sample.labels.get("rank") or sample.labels["worker"]] += sample.value
    return values


def _scrape_until(run: str, metric: str, source: str, least: float) -> dict[str, dict[str, float]]:
    """Scrape until a metric of a rank or worker has reached a value; the agent learns of it with a delay."""
    found: dict[str, dict[str, float]] = {}

    def is_reached() -> bool:
        found.update(_scrape(run))
        return metric in found and found[metric].get(source, 0.0) >= least

    wait_until(is_reached, f"{metric} of {source}", pause=0.5)
    return found


def test_metrics_port_and_logs_agree_with_the_summary_and_the_journal(tmp_path: Path) -> None:
    def kill(step: int) -> None:
        os.kill(processes_titled("ray::ViewWorker")[0].pid, signal.SIGKILL)

    killer = AtStep(tmp_path / "watched", [3], kill)
    killer.start()
    config = tiny_config(
        str(tmp_path),
        run={"name": "watched"},
        training={"epochs": 1},
        tracking={"knn_images": 0},
        cluster={"num_view_workers": 2},
    )
    messages: list[str] = []
    summary = launch_quietly(config, messages)
    killer.end()
    values = _scrape_until("watched", "ray_hvp_ray_steps_total", "0", 10)
    journal = [json.loads(line) for line in (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()]
    last = journal[-1]["metrics"]
    found = {name.removeprefix("ray_hvp_ray_"): of_rank["0"] for name, of_rank in values.items() if "0" in of_rank}

    assert found["steps_total"] == summary["num_steps"] == len(journal) == 10
    assert found["images_total"] == summary["images_seen"] == 10 * 16
    assert found["batches_total"] == 10
    assert found["views_total"] == 10 * 16 * 4
    assert found["view_bytes_total"] == summary["view_bytes"] == last["stream/bytes"]
    assert found["repeated_batches_total"] == summary["num_batches_repeated"] == last["stream/retries"]
    assert found["worker_deaths_total"] >= 1
    assert found["unreadable_images_total"] == summary["num_unreadable_images"] == 0
    waited = summary["data_wait_fraction"] * summary["train_seconds"]
    assert found["wait_seconds_total"] == pytest.approx(waited, rel=1e-6, abs=1e-6)
    assert found["wait_fraction"] == pytest.approx(summary["data_wait_fraction"], rel=0.25, abs=0.02)
    assert found["first_batch_seconds"] == pytest.approx(summary["first_batch_seconds"])
    assert found["checkpoints_total"] == found["checkpoint_seconds_count"] == 3
    assert time.time() - found["last_checkpoint_timestamp_seconds"] < 60.0
    assert found["loss"] == pytest.approx(summary["loss_last"])
    assert found["images_per_second"] == pytest.approx(last["perf/images_per_second"])
    assert found["progress_fraction"] == 1.0
    assert found["spilled_bytes"] == summary["spilled_bytes"]
    assert found["worker_restarts"] == summary["num_worker_restarts"]
    with_histogram = {name.removesuffix("_count").removesuffix("_bucket").removesuffix("_sum") for name in values}
    without_mlflow = {name for name in (*TRAINER_METRICS, *WORKER_METRICS) if "mlflow" not in name}
    assert with_histogram == {f"ray_{name}" for name in without_mlflow}

    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    lines = [
        line for path in logs.glob("worker-*.err") for line in path.read_text().splitlines() if "run=watched" in line
    ]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), lines
    assert {match[3] for match in matches if match} == {"rank=0", "worker=view-worker-0", "worker=view-worker-1"}
    gone = [line for line in lines if "died" in line]
    assert gone
    warning = r"WARNING run=watched rank=0 step=\d+ hvp_ray.stream.view_stream: view worker \d died"
    assert all(re.search(warning, line) for line in gone)
    short = [f"warning: {line.split(': ', 1)[1]}" for line in gone]
    assert [message for message in messages if "died" in message] == short


def test_view_worker_publishes_what_it_rendered() -> None:
    config = tiny_config("unused", run={"output": None, "name": "rendered"})
    order = build_order(config, open_dataset(config.data))
    request_of = requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})
    worker = ViewWorkerActor.options(num_cpus=0.5).remote(config_to_dict(config), "cpu", "view-worker-0")
    batches = [ray.get(worker.render.remote(request_of(step))) for step in range(3)]
    found = _scrape_until("rendered", "ray_hvp_ray_worker_batches_total", "view-worker-0", 3)
    ray.kill(worker)
    values = {name: of_worker["view-worker-0"] for name, of_worker in found.items()}
    assert values["ray_hvp_ray_worker_batches_total"] == 3
    assert values["ray_hvp_ray_worker_views_total"] == 3 * 16 * 4
    seconds, cpu_seconds = (sum(getattr(b, name) for b in batches) for name in ("render_seconds", "render_cpu_seconds"))
    assert values["ray_hvp_ray_worker_render_seconds_total"] == pytest.approx(seconds)
    assert values["ray_hvp_ray_worker_render_cpu_seconds_total"] == pytest.approx(cpu_seconds)
    assert values["ray_hvp_ray_worker_views_per_second"] == pytest.approx(16 * 4 / batches[2].render_seconds)
    assert values["ray_hvp_ray_worker_unreadable_images_total"] == 0
