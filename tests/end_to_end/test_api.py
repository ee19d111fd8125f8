"""The package from Python with Ray: a run has the bits of the same run in one process, and a comparison has its report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hvp_ray as hvp

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SETTINGS = {"training.num_steps": 8, "training.images_per_step": 16, "tracking.uri": "none", "cluster.device": "cpu"}
COMPARISON = f"""
import hvp_ray as hvp

found = hvp.compare(
    name="small",
    arms=["vanilla", "hardest"],
    seeds=[0, 1],
    output="runs",
    settings={SETTINGS | {"tracking.num_figure_images": 0}!r},
    progress=False,
)
assert "<html" in found.report.read_text() and found.sentence and "result" in found.figures
print(sorted(zip(found.runs["arm"], found.runs["seed"].tolist())))
"""


def test_run_has_equal_bits_with_and_without_ray(tmp_path: Path, ray_session: None) -> None:
    on_ray = hvp.pretrain(name="ray", output=tmp_path, settings=SETTINGS, progress=False)
    alone = hvp.pretrain(name="alone", output=tmp_path, settings=SETTINGS, ray=False, progress=False)
    assert on_ray.summary["weights_digest"] == alone.summary["weights_digest"]
    assert on_ray.metrics["train/loss"].equals(alone.metrics["train/loss"])


def test_comparison_has_its_report_and_runs(tmp_path: Path) -> None:
    """In a process of its own, because Ray cannot ship functions whose types are checked at run time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", COMPARISON], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    expected = [("hardest", 0), ("hardest", 1), ("vanilla", 0), ("vanilla", 1)]
    assert result.stdout.splitlines()[-1] == str(expected)
