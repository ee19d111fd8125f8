"""A run without Ray: it imports no Ray, and every value that it records is in the table of metrics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hvp_ray.tracking.metrics_table import RECORDED, SUMMARY

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

PROGRAM = """
import sys
from hvp_ray.launch.local import pretrain_in_process
from tests.helpers import tiny_config

run, training = {"name": "local"}, {"epochs": 1}
summary = pretrain_in_process(tiny_config(sys.argv[1], run=run, training=training))
assert summary["num_steps"] == 10
assert "ray" not in sys.modules, "a run without Ray imported it"
"""


def test_run_without_ray_imports_no_ray_and_its_metrics_are_documented(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "local" / "summary.json").read_text())
    of_mlflow = {"mlflow_experiment_id"}
    assert set(summary) | of_mlflow == set(SUMMARY)
    lines = (tmp_path / "local" / "metrics.jsonl").read_text().splitlines()
    assert {name for line in lines for name in json.loads(line)["metrics"]} <= set(RECORDED)
