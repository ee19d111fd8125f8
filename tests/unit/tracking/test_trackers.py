"""TensorBoard and W&B: each holds what the log holds, each step once, also after a kill; none can stop a run."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvp_ray.config import RunConfig
from hvp_ray.errors import ConfigError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.runs.backfill import send_missing_records
from hvp_ray.runs.location import mlflow_location
from hvp_ray.tracking.run_log import EVALUATIONS, METRICS, RunLog, read_records
from hvp_ray.tracking.tensorboard import TensorboardFeed, TensorboardRun
from hvp_ray.tracking.trackers import lacks_records
from hvp_ray.tracking.wandb import WandbFeed, WandbRun
from tests.helpers import tiny_config

ROOT = Path(__file__).parents[3]
RUN = WandbRun(project="tests", run_id="0123456789abcdef", run_name="one", group=None, job_type=None, config={"a.b": 1})
FEEDS = {"tensorboard": (TensorboardFeed, TensorboardRun()), "wandb": (WandbFeed, RUN)}

Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))


def _of_log(run_dir: Path) -> Points:
    points: Points = {}
    for kind in (METRICS, EVALUATIONS):
        for record in read_records(run_dir, kind):
            for name, value in record["metrics"].items():
                points.setdefault(name, []).append((record["step"], value))
    return points


def _of_tensorboard(run_dir: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _wandb_records(run_dir: Path) -> Iterator[Any]:
    """Read the transaction logs of all offline folders: LevelDB's format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, position, content = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            left = 32768 - position % 32768
            if left < 7:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            content += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(content)
                content = b""


def _of_wandb(run_dir: Path) -> Points:
    points: Points = {}
    for record in _wandb_records(run_dir):
        row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        step = row.get("eval/step" if "eval/knn_top1" in row else "step")
        for name, value in row.items():
            if name not in ("step", "eval/step") and not name.startswith(("_", "figures/")):
                points.setdefault(name, []).append((step, value))
    return points


def _assert_same(found: Points, log: Points) -> None:
    assert {name for name in found if not name.startswith("summary/")} == set(log)
    for name, points in log.items():
        steps, values = zip(*points, strict=True)
        assert [step for step, _ in found[name]] == list(steps), name
        np.testing.assert_array_equal(np.float32([value for _, value in found[name]]), np.float32(values), name)


READERS = {"tensorboard": _of_tensorboard, "wandb": _of_wandb}


def _write(run_dir: Path, steps: range, *, attempt: int = 1, first_step: int = 0) -> None:
    """Write records whose values tell the attempts apart."""
    log = RunLog(run_dir, attempt=attempt, first_step=first_step)
    for step in steps:
        metrics = {"train/loss": attempt + 1.0 / step} | {f"perf/{index}": float(index) for index in range(30)}
        log.write(METRICS, {"step": step, "time": 1e9 + step, "metrics": metrics})
        if step % 10 == 0:  # the answer comes 7 steps later
            log.write(EVALUATIONS, {"step": step - 7, "time": 1e9 + step, "metrics": {"eval/knn_top1": 1.0 / step}})


KILLED = """
import os, sys, time
from pathlib import Path
from tests.unit.tracking.test_trackers import FEEDS, _write
feed, run = FEEDS[sys.argv[1]]
_write(Path(sys.argv[2]), range(1, 61))
sending = feed(run, Path(sys.argv[2]))
while sending.num_waiting():
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FEEDS)
def test_killed_and_resumed_run_has_each_step_of_its_log_once(name: str, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, name, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    _write(tmp_path, range(41, 81), attempt=2, first_step=40)
    feed, run = FEEDS[name]
    assert feed(run, tmp_path).finish(status="FINISHED", artifacts=[], values={"summary/knn_top1": 0.5})
    log = _of_log(tmp_path)
    assert [step for step, _ in log["train/loss"]] == list(range(1, 81))
    _assert_same(READERS[name](tmp_path), log)
    assert not lacks_records(tmp_path)


@pytest.mark.slow
def test_offline_folders_of_attempts_that_ended_are_kept_and_continued(tmp_path: Path) -> None:
    """A user may have sent them already. A step that was trained again keeps its first value, as in MLflow."""
    _write(tmp_path, range(1, 51))
    assert WandbFeed(RUN, tmp_path).finish(status="FAILED", artifacts=[], values={})
    first = _of_wandb(tmp_path)
    assert lacks_records(tmp_path)
    _write(tmp_path, range(41, 81), attempt=2, first_step=40)
    assert WandbFeed(RUN, tmp_path).finish(status="FINISHED", artifacts=[], values={})
    both = _of_wandb(tmp_path)
    assert [step for step, _ in both["train/loss"]] == list(range(1, 81))
    assert [step for step, _ in both["eval/knn_top1"]] == list(range(3, 74, 10))
    assert all(both[name][: len(points)] == points for name, points in first.items())
    runs = [record.run for record in _wandb_records(tmp_path) if record.HasField("run")]
    assert len({Path(path).parent for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}) == 2
    assert {run.run_id for run in runs} == {RUN.run_id}


def _config(folder: Path, *loggers: str) -> RunConfig:
    tracking = {"loggers": loggers, "num_figure_images": 2, "knn_every_epochs": 1}
    return tiny_config(str(folder), run={"name": "one"}, tracking=tracking)


@pytest.mark.slow
def test_stopped_and_resumed_run_goes_to_several_trackers_with_figures_and_summary(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = _config(tmp_path, "tensorboard", "wandb")
    assert pretrain_in_process(config, report_progress=lambda _progress: True) is None
    summary = pretrain_in_process(config)
    assert summary is not None and summary["num_resumes"] == 1
    run = tmp_path / "one"
    log = _of_log(run)
    for read in READERS.values():
        _assert_same(read(run), log)
    assert _of_tensorboard(run)["summary/knn_top1"] == [(0, pytest.approx(summary["knn_top1"]))]
    last = [record.summary for record in _wandb_records(run) if record.HasField("summary")]
    values = {item.key: json.loads(item.value_json) for part in last for item in part.update}
    assert values["summary/knn_top1"] == summary["knn_top1"]
    figures = {path.stem: path.read_bytes() for path in (run / "figures").glob("*.png")}
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {tag: events.Images(tag)[0].encoded_image_string for tag in events.Tags()["images"]}
    assert shown == {f"figures/{name}": content for name, content in figures.items()}
    media = {path.read_bytes() for path in run.glob("wandb/offline-run-*/files/media/images/figures/*.png")}
    assert media == set(figures.values())


def test_tracker_that_fails_does_not_stop_the_run_and_gets_everything_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvp_ray.runs.recorder.FINISH_SECONDS", 0.1)
    config = _config(tmp_path, "tensorboard")
    obstacle = tmp_path / "one" / "tensorboard"
    obstacle.parent.mkdir()
    obstacle.write_text("a file in the place of the folder")
    summary = pretrain_in_process(config)
    assert summary is not None and summary["problems"] == []
    assert caplog.text.count("its records stay in the log") == 1
    assert lacks_records(tmp_path / "one")
    obstacle.unlink()
    assert send_missing_records(config) == summary
    _assert_same(_of_tensorboard(tmp_path / "one"), _of_log(tmp_path / "one"))
    assert send_missing_records(config) is None


def test_mlflow_is_off_without_its_package_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = tiny_config(str(tmp_path), tracking={"uri": "auto"})
    assert mlflow_location(config, tmp_path) == (None, None)
    named = tiny_config(str(tmp_path), tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    with pytest.raises(ConfigError, match=r"tracking.uri needs the package mlflow.* pip install 'hvp-ray\[mlflow\]'"):
        pretrain_in_process(named)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_missing_package_is_said_before_anything_starts(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, logger, None)
    with pytest.raises(ConfigError, match=rf"tracking.loggers={logger} needs .* pip install 'hvp-ray\[{logger}\]'"):
        pretrain_in_process(_config(tmp_path / "runs", logger))
    assert not (tmp_path / "runs").exists()
    assert os.listdir(tmp_path) == []
