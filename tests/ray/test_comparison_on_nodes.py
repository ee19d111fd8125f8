"""Runs of a comparison anywhere on a cluster without a shared disk: a lost process and a lost node cost no bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hvp_ray.launch.local import pretrain_in_process
from tests.ray.comparison_on_nodes import study_of

pytestmark = [pytest.mark.ray, pytest.mark.long]


def test_runs_on_a_bucket_survive_a_lost_process_and_a_lost_node_with_equal_bits(tmp_path: Path) -> None:
    """A Ray of its own, because a node is lost, and because Ray's processes need the bucket's keys."""
    program = [sys.executable, "-m", "tests.ray.comparison_on_nodes", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    undisturbed = [pretrain_in_process(run.config) for run in study_of(str(tmp_path / "undisturbed")).runs()]
    assert result["digests"] == [summary["weights_digest"] for summary in undisturbed if summary is not None]
    assert all(number >= 1 for number in result["resumes"]), result
    assert result["problems"] == [[], []]
    assert not result["is_repeated"]
