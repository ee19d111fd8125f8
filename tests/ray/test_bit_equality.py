"""Weights are equal bit for bit, whatever is killed or restarted. BatchNorm network, two epochs, CPU.

Digits, 160 training images, 16 a step: 10 steps an epoch, 20 in all, checkpoints every 4.
"""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hvp_ray.config import RunConfig
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.launch.local import pretrain_in_process
from tests.distributed.processes import run_ranks
from tests.helpers import tiny_config
from tests.ray.runs import (
    AtStep,
    attempts,
    digest_from_checkpoint,
    launch_quietly,
    processes_titled,
    recorded_steps,
)

pytestmark = pytest.mark.usefixtures("ray_session")


def _config(output: Path, name: str, *, seed: int = 0, **cluster: object) -> RunConfig:
    return tiny_config(str(output), run={"name": name, "seed": seed}, cluster=cluster)


def _check(output: Path, name: str, summary: dict[str, Any]) -> str:
    """Check the digest against the checkpoint on disk, and that each step is journalled once; return it."""
    assert summary["weights_digest"] == digest_from_checkpoint(output / name)
    assert recorded_steps(output / name) == list(range(1, 21))
    assert summary["spilled_bytes"] == 0
    return str(summary["weights_digest"])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(output: Path) -> str:
    """Return the digest of an uninterrupted run, rendered in the trainer's own process."""
    summary = pretrain_in_process(_config(output, "straight"))
    assert summary is not None
    assert summary["num_steps"] == 20
    return _check(output, "straight", summary)


def test_three_view_workers_equal_inline_rendering(output: Path, straight: str) -> None:
    """All settings of Ray's processes that are not part of the identity differ too (tests/unit/test_identity.py)."""
    settings = {
        "num_view_workers": 3,
        "batches_in_flight": 6,
        "placement": "anywhere",
        "resize_check_seconds": 1.0,
        "cpus_per_trainer": 0.5,
        "cpus_per_view_worker": 0.5,
        "late_factor": 2.0,
        "late_seconds": 5.0,
        "stall_seconds": 500.0,
        "max_trainer_failures": 1,
    }
    three = launch_quietly(_config(output, "three", **settings))
    assert _check(output, "three", three) == straight
    other_seed = pretrain_in_process(_config(output, "other-seed", seed=1))
    assert other_seed is not None
    assert other_seed["weights_digest"] != straight


@pytest.mark.long
def test_shipped_pixels_with_workers_finishers_and_the_trainer_killed_equal_inline(output: Path, straight: str) -> None:
    """Two view workers decode, and two finishers beside the trainer render.

    The trainer is killed in the last step of epoch 0 and in the first of epoch 1; both follow a checkpoint by two steps.
    """

    def kill_views(step: int) -> None:
        for process in processes_titled({3: "ray::ViewWorker", 6: "ray::ViewFinisher"}[step]):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(step)

    def kill_trainer(step: int) -> None:
        os.kill(attempts(output / "pixels")[-1]["process_id"], signal.SIGKILL)

    killed: list[int] = []
    killers = [AtStep(output / "pixels", [step], kill_views) for step in (3, 6)]
    killers.append(AtStep(output / "pixels", [9, 10], kill_trainer))
    for killer in killers:
        killer.start()
    cluster = {"ship": "pixels", "num_view_workers": 2, "finishers_per_trainer": 2}
    summary = launch_quietly(_config(output, "pixels", **cluster))
    for killer in killers:
        killer.end()
    assert [len(killer.fired) for killer in killers] == [1, 1, 2]
    assert [attempt["step"] for attempt in attempts(output / "pixels")] == [0, 8, 8]
    assert summary["num_resumes"] == 2
    assert summary["num_worker_restarts"] == 2
    assert killed == [3, 3, 6, 6]
    assert _check(output, "pixels", summary) == straight


@pytest.mark.long
def test_ibot_with_view_workers_and_a_trainer_killed_equals_inline(output: Path) -> None:
    """iBOT has the most state (teacher, two centres, masks, local views). Every second step is vanilla."""

    def config(name: str, **cluster: object) -> RunConfig:
        return tiny_config(
            str(output), recipe="ibot-digits", run={"name": name}, selection={"every": 2}, cluster=cluster
        )

    def kill(step: int) -> None:
        for worker in processes_titled("ray::ViewWorker"):
            os.kill(worker.pid, signal.SIGKILL)
        if step == 6:
            os.kill(attempts(output / "ibot-killed")[-1]["process_id"], signal.SIGKILL)

    inline = pretrain_in_process(config("ibot-inline"))
    assert inline is not None
    killer = AtStep(output / "ibot-killed", [6], kill)
    killer.start()
    messages: list[str] = []
    summary = launch_quietly(config("ibot-killed", num_view_workers=2), messages)
    killer.end()
    assert killer.fired
    assert summary["num_resumes"] == 1
    assert summary["num_worker_restarts"] >= 1
    assert _check(output, "ibot-killed", summary) == inline["weights_digest"]


@pytest.mark.long
def test_proposals_with_view_workers_and_a_trainer_killed_equal_inline(output: Path) -> None:
    """The delay is one more than the batches in flight. Two probes were learned from since the newest checkpoint."""

    def config(name: str, **cluster: object) -> RunConfig:
        selection = {"rule": "predicted", "predictor_delay": 4, "probe_every": 1}
        return tiny_config(str(output), run={"name": name}, selection=selection, cluster=cluster)

    def kill(step: int) -> None:
        for worker in processes_titled("ray::ViewWorker"):
            os.kill(worker.pid, signal.SIGKILL)
        os.kill(attempts(output / "proposals-killed")[-1]["process_id"], signal.SIGKILL)

    inline = pretrain_in_process(config("proposals-inline"))
    assert inline is not None
    killer = AtStep(output / "proposals-killed", [10], kill)
    killer.start()
    summary = launch_quietly(config("proposals-killed", num_view_workers=2, batches_in_flight=3))
    killer.end()
    assert killer.fired
    assert summary["num_resumes"] == 1
    assert _check(output, "proposals-killed", summary) == inline["weights_digest"]
    pixels = launch_quietly(config("proposals-pixels", ship="pixels", finishers_per_trainer=1))
    assert pixels["weights_digest"] == inline["weights_digest"]
    with pytest.raises(ConfigError, match="selection.predictor_delay=4.*more than the 4 batches"):
        launch_quietly(config("proposals-ahead", batches_in_flight=4))


def _train_without_ray(rank: int, num_ranks: int, output: str) -> dict[str, Any] | None:
    return pretrain_in_process(_config(Path(output), "two", num_trainers=num_ranks))


@pytest.mark.long
def test_two_trainers_killed_and_resumed_equal_two_straight_without_ray(output: Path, straight: str) -> None:
    two = run_ranks(_train_without_ray, 2, str(output))[0]
    digest = _check(output, "two", two)
    assert digest != straight  # another summation order: the number of trainers is part of the identity

    def kill(step: int) -> None:
        rank_0 = attempts(output / "two-killed")[-1]["process_id"]
        others = [p for p in processes_titled("RayTrainWorker") if p.pid != rank_0]
        assert others
        os.kill(others[0].pid, signal.SIGKILL)

    killer = AtStep(output / "two-killed", [6], kill)
    killer.start()
    killed = launch_quietly(_config(output, "two-killed", num_trainers=2, num_view_workers=2))
    killer.end()
    assert killed["num_resumes"] == 1
    assert _check(output, "two-killed", killed) == digest


def test_resume_with_another_identity_is_refused_and_says_what_differs(output: Path, straight: str) -> None:
    config = _config(output, "straight")
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.1))
    with pytest.raises(CheckpointError, match=r"optimizer.weight_decay: 0.0005 -> 0.1"):
        launch_quietly(other)
    with pytest.raises(CheckpointError, match=r"cluster.num_trainers: 1 -> 2"):
        launch_quietly(_config(output, "straight", num_trainers=2))
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
    with pytest.raises(ConfigError, match="run.resume=False"):
        launch_quietly(fresh)
    assert digest_from_checkpoint(output / "straight") == straight
