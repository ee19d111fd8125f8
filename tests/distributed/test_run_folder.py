"""Trainers that do not share a run's folder end with a sentence on every rank, before the first step."""

import importlib.metadata
import os
from pathlib import Path

import pytest

from hvp_ray.errors import CheckpointError
from hvp_ray.identity import _version
from hvp_ray.launch.local import pretrain_in_process
from tests.distributed.processes import run_ranks
from tests.helpers import tiny_config

pytestmark = pytest.mark.distributed


def _train(rank: int, num_ranks: int, outputs: list[str], epochs: int) -> str:
    run, training = {"name": "run"}, {"epochs": 2, "num_steps": epochs * 10, "checkpoint_every_steps": 10}
    config = tiny_config(outputs[rank], run=run, training=training, cluster={"num_trainers": num_ranks})
    try:
        summary = pretrain_in_process(config)
    except CheckpointError as error:
        return str(error)
    except RuntimeError as error:  # gloo: the other rank has ended
        return f"torn out: {error}"
    return f"{summary['num_steps']} steps" if summary is not None else "done"


def _train_without_a_name(rank: int, num_ranks: int, output: str) -> list[str]:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    config = tiny_config(output, run={"name": None}, training={"epochs": 1}, cluster={"num_trainers": num_ranks})
    pretrain_in_process(config)
    return sorted(path.name for path in Path(output).iterdir() if path.is_dir())


def test_trainer_on_another_disk_is_found_before_the_first_step(tmp_path: Path) -> None:
    outputs = [str(tmp_path / "one"), str(tmp_path / "two")]
    results = run_ranks(_train, 2, outputs, 1)
    assert "do not share this folder" in results[1]
    assert not (tmp_path / "one" / "run" / "summary.json").exists()
    assert not results[0].endswith("steps")


def test_trainers_that_would_begin_at_different_steps_say_so(tmp_path: Path) -> None:
    shared, other = str(tmp_path / "one"), str(tmp_path / "two")
    assert run_ranks(_train, 2, [shared, shared], 1) == ["10 steps", "done"]
    results = run_ranks(_train, 2, [shared, other], 1)
    assert all("begin at different steps ([10, 0], by rank)" in result for result in results)


def _train_with_pillow(rank: int, num_ranks: int, output: str, versions: list[str]) -> str:
    def version(name: str) -> str:
        return versions[rank] if name == "pillow" else real(name)

    real, importlib.metadata.version = importlib.metadata.version, version
    _version.cache_clear()
    try:
        return _train(rank, num_ranks, [output] * num_ranks, 1)
    finally:
        importlib.metadata.version = real
        _version.cache_clear()


def test_trainers_with_different_versions_of_libraries_say_so(tmp_path: Path) -> None:
    assert run_ranks(_train_with_pillow, 2, str(tmp_path), ["1", "1"]) == ["10 steps", "done"]
    (tmp_path / "run" / "summary.json").unlink()
    results = run_ranks(_train_with_pillow, 2, str(tmp_path), ["1", "2"])
    assert all("trainers have different versions of libraries" in result for result in results), results
    assert "{'pillow': '2'}" in results[1]


def test_processes_of_a_run_without_a_name_share_one(tmp_path: Path) -> None:
    first, second = run_ranks(_train_without_a_name, 2, str(tmp_path))
    assert len(first) == len(second) == 1
