"""MLflow on a SQLite file: everything arrives, nothing twice, and an absent server costs nothing."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvp_ray.tracking.mlflow import MlflowFeed, MlflowRun, quiet_mlflow
from hvp_ray.tracking.run_log import METRICS, RunLog
from hvp_ray.tracking.trackers import lacks_records

pytestmark = pytest.mark.slow


def _run(uri: str) -> MlflowRun:
    return MlflowRun(
        uri=uri,
        experiment="tests",
        artifact_root=None,
        run_name="one",
        params={f"section.{i}": i for i in range(130)},
        tags={"selection_rule": "hardest"},
        dataset_name="digits",
        dataset_source="digits",
        dataset_digest="0" * 64,
    )


def _write(run_dir: Path, steps: range, *, attempt: int = 1, first_step: int = 0) -> None:
    log = RunLog(run_dir, attempt=attempt, first_step=first_step)
    for step in steps:
        metrics = {"train/loss": 1.0 / step} | {f"perf/{i}": float(i) for i in range(30)}
        log.write(METRICS, {"step": step, "time": time.time(), "metrics": metrics})


def test_every_step_arrives_once_over_a_resume_with_params_tags_and_artifacts(tmp_path: Path) -> None:
    quiet_mlflow()
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_dir = tmp_path / "one"
    _write(run_dir, range(1, 61))
    _write(run_dir, range(61, 81), first_step=60)
    first = MlflowFeed(_run(uri), run_dir)
    assert first.finish(status="FAILED", artifacts=[], values={})
    _write(run_dir, range(61, 101), attempt=2, first_step=60)
    second = MlflowFeed(_run(uri), run_dir)
    figure = run_dir / "a.png"
    figure.write_bytes(b"png")
    assert second.finish(status="FINISHED", artifacts=[figure], values={"summary/knn_top1": 0.5})
    assert first.run_id == second.run_id
    assert second.run_id is not None
    client = mlflow.MlflowClient(uri)
    history = client.get_metric_history(second.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 101))
    run = client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["section.129"] == "129"
    assert run.data.tags["selection_rule"] == "hardest"
    assert run.data.metrics["summary/knn_top1"] == 0.5
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    assert [file.path for file in client.list_artifacts(second.run_id, "figures")] == ["figures/a.png"]
    assert json.loads((run_dir / "mlflow.json").read_text())["run_id"] == second.run_id
    assert "MLFLOW_TRACKING_URI" not in os.environ  # or the next run of this process would go there too


def test_absent_server_is_said_once_and_does_not_hold_the_run_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, range(1, 4))
    feed = MlflowFeed(_run("http://127.0.0.1:9"), tmp_path)
    started = time.monotonic()
    assert not feed.finish(status="FINISHED", artifacts=[], values={}, timeout_seconds=2.0)
    assert time.monotonic() - started < 6.0  # MLflow's own retries would take minutes
    assert "The log of the run has it" in caplog.text
    assert lacks_records(tmp_path)


def test_backlog_and_outage_are_known_and_end_when_the_server_took_everything(tmp_path: Path) -> None:
    _write(tmp_path / "away", range(1, 6))
    away = MlflowFeed(_run("http://127.0.0.1:9"), tmp_path / "away")
    deadline = time.monotonic() + 300.0
    while not away.is_away and time.monotonic() < deadline:
        time.sleep(0.05)
    _write(tmp_path / "away", range(6, 9))
    assert away.numbers() == {"hvp_ray_mlflow_backlog_records": 8.0, "hvp_ray_mlflow_outage": 1.0}
    assert not away.finish(status="FAILED", artifacts=[], values={}, timeout_seconds=0.1)
    _write(tmp_path / "here", range(1, 6))
    here = MlflowFeed(_run(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "here")
    assert here.finish(status="FINISHED", artifacts=[], values={})
    assert here.numbers() == {"hvp_ray_mlflow_backlog_records": 0.0, "hvp_ray_mlflow_outage": 0.0}


def test_store_that_does_not_know_the_run_gets_a_new_one(tmp_path: Path) -> None:
    """A run on a bucket may go on where MLflow's file is another one."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    _write(tmp_path, range(1, 6))
    unknown = {"run": {"uri": uri}, "run_id": "f" * 32, "experiment_id": "1", "complete": False}
    (tmp_path / "mlflow.json").write_text(json.dumps(unknown))
    kept: list[str] = []
    feed = MlflowFeed(_run(uri), tmp_path, keep_state=lambda: kept.append((tmp_path / "mlflow.json").read_text()))
    assert feed.finish(status="FINISHED", artifacts=[], values={})
    assert feed.run_id not in (None, "f" * 32)
    assert [json.loads(state)["run_id"] for state in kept] == [feed.run_id]
    assert feed.numbers()["hvp_ray_mlflow_backlog_records"] == 0.0


def test_outage_while_the_run_is_made_leaves_one_run_that_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_mlflow()
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_dir = tmp_path / "one"
    _write(run_dir, range(1, 4))
    log_inputs, log_artifact, outages = mlflow.MlflowClient.log_inputs, mlflow.MlflowClient.log_artifact, []

    def fail_once(call: Callable[..., None]) -> Callable[..., None]:
        def called(*arguments: Any, **options: Any) -> None:
            if call not in outages:
                outages.append(call)
                raise ConnectionError("the server is away")
            call(*arguments, **options)

        return called

    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", fail_once(log_inputs))
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", fail_once(log_artifact))
    kept: list[str] = []
    feed = MlflowFeed(_run(uri), run_dir, keep_state=lambda: kept.append((run_dir / "mlflow.json").read_text()))
    (run_dir / "a.png").write_bytes(b"png")
    assert feed.finish(status="FINISHED", artifacts=[run_dir / "a.png"], values={"summary/knn_top1": 0.5})
    assert len(outages) == 2
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs(["1"])
    assert [run.info.run_id for run in runs] == [feed.run_id]
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params["section.129"] == "129"
    assert len(runs[0].inputs.dataset_inputs) == 1
    assert feed.run_id is not None
    assert all(feed.run_id in state for state in kept)
    assert len(client.get_metric_history(feed.run_id, "summary/knn_top1")) == 1
