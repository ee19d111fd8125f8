"""Starts at which no view worker comes up. The run stays as it was."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

from hvp_ray.errors import HvpRayError
from hvp_ray.launch import driver
from hvp_ray.launch.stop import StoppedError, StopRequest
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.prepare import prepare_run
from tests.helpers import tiny_config
from tests.ray.runs import attempts, launch_quietly

pytestmark = pytest.mark.usefixtures("ray_session")


def _trainers_are_gone() -> bool:
    return not any(thread.name == "ray-train" for thread in threading.enumerate())


def test_a_run_whose_workers_find_other_data_ends_and_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any, **options: Any) -> RunJob:
        return dataclasses.replace(prepare_run(*arguments, **options), data_fingerprint="of other images")

    config = tiny_config(str(tmp_path), run={"name": "run"}, training={"epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr(driver, "prepare_run", prepare)
        with pytest.raises(HvpRayError, match="no view worker could start"):
            launch_quietly(config)
    assert _trainers_are_gone()
    assert not (tmp_path / "run" / "owner").exists()
    assert attempts(tmp_path / "run") == []

    assert launch_quietly(config)["num_resumes"] == 0


def test_a_stop_before_a_worker_is_up_ends_the_run(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.ask()
    with pytest.raises(StoppedError, match="before a view worker was up; to continue: hvp-ray pretrain --run.name run"):
        launch_quietly(tiny_config(str(tmp_path), run={"name": "run"}), stop=stop)
    assert _trainers_are_gone()
    assert attempts(tmp_path / "run") == []
