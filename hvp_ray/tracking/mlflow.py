"""MLflow, fed from the run's log by one background thread: training never waits for it, and each step arrives once.

The thread reads new records of metrics and evaluations, sends them in batches, and continues after an outage. After every
failure it looks the run up again, because a user may have deleted it in MLflow's page. It then creates a new run and sends
everything. The server reports the last step that it has, so records that a resume rewrites are not sent twice.

`finish` waits a limited time for the rest. `catch_up` sends what is still missing, when the run is started again by its name.
`mlflow.json` in the run's folder is the feed's state, replaced as a whole: the description of the run, its ids in MLflow, and
whether everything arrived.
"""

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvp_ray.errors import first_line
from hvp_ray.files import write_file
from hvp_ray.tracking.mlflow_store import StoreError, prepare_store
from hvp_ray.tracking.run_log import EVALUATIONS, METRICS, START, Position, read_records_after

logger = logging.getLogger(__name__)

_MAX_METRICS_PER_CALL = 1000
_MAX_PARAMS_PER_CALL = 100
_MAX_PARAM_LENGTH = 6000
_MAX_FAILURE_LENGTH = 300
_PAUSE_SECONDS = 2.0
_BUSY_STATUS = (408, 429)
"""HTTP: timeout, too many requests."""
STATE_FILE = "mlflow.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowRun:
    """The description of a run that is sent to MLflow."""

    uri: str
    experiment: str
    artifact_root: str | None
    """Artifact folder of a new experiment; None: the server decides."""
    run_name: str
    params: dict[str, Any]
    tags: dict[str, str]
    dataset_name: str
    dataset_source: str
    dataset_digest: str


def quiet_mlflow() -> None:
    """Switch MLflow's telemetry and long retries off, before it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)


class MlflowFeed:
    """Sends a run's log to MLflow; made and finished by rank 0."""

    def __init__(
        self,
        run: MlflowRun,
        run_dir: Path,
        *,
        keep_state: Callable[[], None] = lambda: None,
        watches_system: bool = True,
    ) -> None:
        """Start the thread.

        Args:
            run: description of the run.
            run_dir: has the log.
            keep_state: called by the thread when `mlflow.json` has the ids of a new MLflow run.
            watches_system: send load and memory of this machine, because the run trains on it.
        """
        self._run = run
        self._watches_system = watches_system
        self._keep_state = keep_state
        self._state_path = run_dir / STATE_FILE
        known = _read_state(run_dir)
        same_server = known.get("run", {}).get("uri") == run.uri
        ids: dict[str, Any] = {name: known[name] for name in ("run_id", "experiment_id", "described") if name in known}
        self._state: dict[str, Any] = {"run": asdict(run), **(ids if same_server else {}), "complete": False}
        self._note()
        self._cursors = [_Cursor(run_dir, METRICS, "train/loss"), _Cursor(run_dir, EVALUATIONS, "eval/knn_top1")]
        self._wake = threading.Event()
        self._closing = False
        self._deadline = float("inf")
        self._num_refusals = 0
        self._failure = "no answer"
        self.is_away = False
        """Whether the last attempt to send failed."""
        self._artifacts: list[Path] = []
        self._final: dict[str, Any] | None = None
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._monitor: Any = None
        self._client: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow-feed", daemon=True)
        self._thread.start()

    def finish(
        self, *, status: str, artifacts: list[Path], values: dict[str, float], timeout_seconds: float = 120.0
    ) -> bool:
        """Send the rest, the final values and artifacts, and end the MLflow run; return whether all of it arrived."""
        self._artifacts = artifacts
        self._final = {"status": status, "values": values, "time_ms": int(time.time() * 1000)}
        self._deadline = time.monotonic() + timeout_seconds
        self._closing = True
        self._wake.set()
        if self.is_away:
            logger.warning("MLflow at %s is unreachable; waiting at most %g s", self._run.uri, timeout_seconds)
        self._thread.join(timeout=timeout_seconds)
        done = not self._thread.is_alive() and self._final is None
        if not done:
            logger.warning(
                "MLflow at %s did not receive everything (%s). The log of the run has it; start the run again by its name to "
                "send it",
                self._run.uri,
                self._failure,
            )
        return done

    def numbers(self) -> dict[str, float]:
        """Return what `stream.metrics` publishes of this feed; one thread may call this."""
        waiting = sum(cursor.num_waiting() for cursor in self._cursors)
        return {"hvp_ray_mlflow_backlog_records": float(waiting), "hvp_ray_mlflow_outage": float(self.is_away)}

    def _work(self) -> None:
        quiet_mlflow()
        while True:
            try:
                if self._client is None:
                    self._open()
                for cursor in self._cursors:
                    self._send_new_records(cursor)
                self._watch_system()
                if self._closing:
                    self._send_final()
                    self.is_away = False
                    return
                self.is_away = False
                self._num_refusals = 0
            except Exception as error:  # noqa: BLE001 (training continues, whatever fails in MLflow)
                self._client = None  # the server may have lost what it had before the failure
                self._failure = f"{type(error).__name__}: {first_line(error)}"[:_MAX_FAILURE_LENGTH]
                self._num_refusals = self._num_refusals + 1 if _is_refusal(error) else 0
                if not self.is_away:
                    logger.warning(
                        "MLflow at %s: %s; its records stay in the log, retrying", self._run.uri, self._failure
                    )
                self.is_away = True
                is_final = time.monotonic() >= self._deadline or self._num_refusals > 1
                if self._closing and is_final:
                    return
            self._wake.wait(timeout=_PAUSE_SECONDS)
            self._wake.clear()

    def _open(self) -> None:
        import mlflow

        prepare_store(self._run.uri)
        # Never `set_tracking_uri`: it sets MLFLOW_TRACKING_URI, which later runs of this process would follow.
        client = mlflow.MlflowClient(tracking_uri=self._run.uri)
        run_id: str = self._state.get("run_id", "")
        experiment_id = _experiment_of(client, run_id) if run_id else None
        if experiment_id is None:
            experiment_id = open_experiment(client, self._run.experiment, self._run.artifact_root)
            run = client.create_run(experiment_id, run_name=self._run.run_name, tags=self._run.tags)
            run_id = run.info.run_id
            # Written at once, so that a failure from here on leads to no second run.
            self._note(run_id=run_id, experiment_id=experiment_id, described=False)
            for cursor in self._cursors:
                cursor.position, cursor.num_sent, cursor.sent_step = START, 0, -1
        else:
            for cursor in self._cursors:
                history = client.get_metric_history(run_id, cursor.key)
                cursor.sent_step = max((metric.step for metric in history), default=-1)
            client.update_run(run_id, status="RUNNING")
        if not self._state.get("described", True):
            self._keep_state()
            self._describe(client, run_id)
            self._note(described=True)
        if self._monitor is not None and self.run_id != run_id:
            self._monitor.finish()
            self._monitor = None
        self.run_id, self.experiment_id = run_id, experiment_id
        self._client = client

    def _note(self, **facts: Any) -> None:
        self._state |= facts
        _write_json(self._state_path, self._state)

    def _describe(self, client: Any, run_id: str) -> None:
        """Send the description of the run; sending it twice is harmless."""
        from mlflow.entities import Dataset as MlflowDataset
        from mlflow.entities import DatasetInput, InputTag, Param

        params = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in self._run.params.items()]
        for start in range(0, len(params), _MAX_PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[start : start + _MAX_PARAMS_PER_CALL])
        dataset = MlflowDataset(
            name=self._run.dataset_name,
            digest=self._run.dataset_digest[:36],
            source_type="local",
            source=json.dumps({"uri": self._run.dataset_source}),
        )
        tag = InputTag(key="mlflow.data.context", value="pretraining")
        client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=[tag])])

    def _watch_system(self) -> None:
        """Start MLflow's monitor, or restart it after an outage; it continues after the last step that it logged."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if not self._watches_system or self._closing:
            return
        if self._monitor is not None:
            if self._monitor._process is not None and self._monitor._process.is_alive():
                return
            self._client.get_run(self.run_id)  # raises during an outage, in which the monitor would begin at step 0
            self._monitor.finish()  # sends the rest
        self._monitor = SystemMetricsMonitor(
            self.run_id,
            sampling_interval=5,
            samples_before_logging=2,
            resume_logging=True,
            tracking_uri=self._run.uri,
        )
        self._monitor.start()

    def _send_new_records(self, cursor: "_Cursor") -> None:
        """Send the records after the cursor, whole steps at a time; a failed call is retried from there."""
        from mlflow.entities import Metric

        pending: list[Metric] = []
        position, num_read = cursor.position, 0
        for after, record in read_records_after(cursor.run_dir, cursor.name, cursor.position):
            step, milliseconds = record["step"], int(record["time"] * 1000)
            metrics = [Metric(key, value, milliseconds, step) for key, value in record["metrics"].items()]
            if step > cursor.sent_step:
                if len(pending) + len(metrics) > _MAX_METRICS_PER_CALL:
                    self._send(cursor, pending, position, num_read)
                    pending, num_read = [], 0
                pending += metrics
            position, num_read = after, num_read + 1
        self._send(cursor, pending, position, num_read)

    def _send(self, cursor: "_Cursor", metrics: list[Any], position: Position, num_records: int) -> None:
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            cursor.sent_step = metrics[-1].step
        cursor.position = position
        cursor.num_sent += num_records

    def _send_final(self) -> None:
        assert self._final is not None
        from mlflow.entities import Metric

        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        metrics = [Metric(key, value, self._final["time_ms"], 0) for key, value in self._final["values"].items()]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            self._final["values"] = {}  # sent, so a retry after a failure below leaves them out
        while self._artifacts:
            path = self._artifacts[0]
            folder = "figures" if path.suffix == ".png" else None
            self._client.log_artifact(self.run_id, str(path), artifact_path=folder)
            self._artifacts.pop(0)
        self._client.set_terminated(self.run_id, status=self._final["status"])
        self._note(complete=self._final["status"] == "FINISHED")
        self._final = None


def final_values(summary: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a summary under their names in MLflow."""
    return {
        f"summary/{name}": float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def final_artifacts(run_dir: Path) -> list[Path]:
    """Return the files of an ended run that are sent to MLflow."""
    figures = sorted((run_dir / "figures").glob("*.png"))
    return [path for path in (*figures, run_dir / "backbone.safetensors", run_dir / "config.json") if path.exists()]


def lacks_records(run_dir: Path) -> bool:
    """Tell whether MLflow lacks something of an ended run."""
    return not _read_state(run_dir).get("complete", True)


def catch_up(run_dir: Path) -> dict[str, Any] | None:
    """Send what MLflow lacks of an ended run; return the summary with MLflow's ids, or None: it is still unreachable."""
    run = MlflowRun(**_read_state(run_dir)["run"])
    path = run_dir / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text())
    feed = MlflowFeed(run, run_dir, watches_system=False)
    if not feed.finish(status="FINISHED", artifacts=final_artifacts(run_dir), values=final_values(summary)):
        return None
    summary |= {"mlflow_run_id": feed.run_id, "mlflow_experiment_id": feed.experiment_id}
    _write_json(path, summary)
    return summary


def _experiment_of(client: Any, run_id: str) -> str | None:
    """Return the experiment of a run; None: the run was deleted, or the store is another one and does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return str(run.info.experiment_id) if run.info.lifecycle_stage == "active" else None


def _is_refusal(error: Exception) -> bool:
    """Tell whether an error is an answer that a retry does not change."""
    if isinstance(error, StoreError):
        return True
    status_of = getattr(error, "get_http_status_code", None)  # MLflow's errors have one; its import may be what failed
    return status_of is not None and 400 <= status_of() < 500 and status_of() not in _BUSY_STATUS


def _read_state(run_dir: Path) -> dict[str, Any]:
    path = run_dir / STATE_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(str(path), (json.dumps(content, indent=1) + "\n").encode())


@dataclass(slots=True)
class _Cursor:
    """Progress of sending one kind of records."""

    run_dir: Path
    name: str
    key: str
    """A metric that every record has."""
    position: Position = START
    num_sent: int = 0
    """Records before `position`."""
    sent_step: int = -1
    _seen: Position = START
    _num_seen: int = 0

    def num_waiting(self) -> int:
        """Return how many records are not sent; reads only those that are new since the last call."""
        for position, _ in read_records_after(self.run_dir, self.name, self._seen):
            self._seen = position
            self._num_seen += 1
        return max(self._num_seen - self.num_sent, 0)


def open_experiment(client: Any, name: str, artifact_root: str | None) -> str:
    """Return the id of an experiment; create it if it does not exist.

    MLflow reserves the name of a deleted experiment until `mlflow gc`. Records then go to `<name>-2`, and so on.
    """
    from mlflow.exceptions import MlflowException

    for number in itertools.count(1):
        wanted = name if number == 1 else f"{name}-{number}"
        experiment = client.get_experiment_by_name(wanted)
        if experiment is None or experiment.lifecycle_stage == "active":
            break
    if wanted != name:
        logger.warning(
            "MLflow's experiment %r was deleted; records go to %r. To use %r again, restore it in MLflow or remove it with "
            "`mlflow gc`",
            name,
            wanted,
            name,
        )
    if experiment is None:
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(wanted, artifact_location=artifact_root, tags=kind))
        except MlflowException:
            experiment = client.get_experiment_by_name(wanted)  # another run may just have created it
            if experiment is None:
                raise
    return str(experiment.experiment_id)
