"""A pool that sizes itself while nodes join and are drained: no batch is lost or rendered twice, and no bit changes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.tracking.run_log import METRICS, read_records
from tests.ray.pool_nodes import NUM_STEPS, pool_config, write_images
from tests.ray.runs import digest_from_checkpoint, recorded_steps

pytestmark = [pytest.mark.ray, pytest.mark.long]


def test_pool_grows_to_a_node_that_joins_leaves_a_drained_one_and_gives_idle_workers_back(tmp_path: Path) -> None:
    """The trainer waits for one worker. A node joins, then the first one is drained and leaves by itself.

    A Ray of its own, because nodes are lost.
    """
    write_images(tmp_path / "images")
    program = [sys.executable, "-m", "tests.ray.pool_nodes", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "pool.json").read_text())
    assert "error" not in result, result
    messages, summary = "\n".join(result["messages"]), result["summary"]
    assert "view workers 1 -> 2: trainers waited" in messages
    assert "view workers 0 are on a drained node; 1 of 1 replacements start" in messages
    assert result["node_left_during_run"]
    assert recorded_steps(tmp_path / "pool") == list(range(1, NUM_STEPS + 1))
    assert summary["num_batches_repeated"] == summary["num_worker_restarts"] == summary["num_resumes"] == 0
    sizes = [record["metrics"]["stream/view_workers"] for record in read_records(tmp_path / "pool", METRICS)]
    assert sizes[0] == 1.0
    assert max(sizes) == 2.0

    alone = pretrain_in_process(pool_config(tmp_path, "alone"))
    assert alone is not None
    assert summary["weights_digest"] == digest_from_checkpoint(tmp_path / "pool") == alone["weights_digest"]

    idle = result["idle"]
    assert idle.get("stopped"), idle
    assert any("view workers 2 -> 1: trainers waited less than 1%" in message for message in idle["messages"])
