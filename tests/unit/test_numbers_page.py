"""`docs/numbers.md` explains every number that is recorded or published, and no other."""

import json
import re
from pathlib import Path

from hvp_ray.stream.metrics import TRAINER_METRICS, WORKER_METRICS, exported_name
from hvp_ray.tracking.metric_names import METRICS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "numbers.md"


def documented(section: str) -> set[str]:
    """Return the names in the first column of the tables below the headline that contains `section`."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    text = next(text for title, text in zip(parts[1::2], parts[2::2], strict=True) if section in title)
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert all(len(line.split("|")) == 7 for line in text.splitlines() if line.startswith("| `")), section
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}


def test_every_recorded_number_is_explained() -> None:
    assert documented("metrics.jsonl") == set(METRICS)


def test_every_published_number_is_explained() -> None:
    assert documented("Prometheus") == {exported_name(name) for name in (*TRAINER_METRICS, *WORKER_METRICS)}


def test_dashboard_shows_published_numbers_only() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(dashboard["panels"]) >= 8
    suffixes = r"(_bucket|_count|_sum)$"
    names = {re.sub(suffixes, "", name) for query in queries for name in re.findall(r"ray_hvp_ray_\w+", query)}
    assert all("ray_hvp_ray_" in query for query in queries)
    assert names <= {exported_name(name) for name in (*TRAINER_METRICS, *WORKER_METRICS)}
