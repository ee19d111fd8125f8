"""Elastic training: a node with a trainer is lost, another one joins, and every step is done once without intervention."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.tracking.run_log import METRICS, read_records
from tests.ray.elastic_run import CHECKPOINT_EVERY, elastic_config

pytestmark = [pytest.mark.ray, pytest.mark.long]


def test_trainers_become_fewer_and_more_and_every_step_is_done_once(tmp_path: Path) -> None:
    """Losses equal those of one trainer up to summation order, so images and their order are equal.

    A Ray of its own, because nodes are lost.
    """
    program = [sys.executable, "-m", "tests.ray.elastic_run", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.get("stopped"), result
    assert [attempt["num_trainers"] for attempt in result["attempts"]] == [2, 1, 2]
    assert all(attempt["step"] % CHECKPOINT_EVERY == 0 for attempt in result["attempts"])
    records = list(read_records(tmp_path / "elastic", METRICS))
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    num_compared = result["attempts"][-1]["step"] + CHECKPOINT_EVERY  # into the last attempt
    assert len(records) >= num_compared

    config = elastic_config(tmp_path)
    alone = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, name="alone"),
        training=dataclasses.replace(config.training, num_steps=num_compared),
        cluster=dataclasses.replace(config.cluster, num_trainers=1, min_trainers=None),
    )
    assert pretrain_in_process(alone) is not None
    expected = [r["metrics"]["train/loss"] for r in read_records(tmp_path / "alone", METRICS)]
    losses = [record["metrics"]["train/loss"] for record in records[:num_compared]]
    difference = np.abs(np.array(losses) - expected).max()
    assert difference < 0.25 * np.std(expected), difference  # other images differ by about one standard deviation
