"""MLflow, fed from the journal by one background thread: training never waits for it, and no step stands twice.

The thread reads what is new in `metrics.jsonl`, sends it in batches, and continues after an outage. After every failure it
looks the run up again, because somebody may have deleted it in MLflow's page; then it makes a new one and sends everything.
What is not sent when the run ends (`finish` waits a while) is sent by `catch_up`, when the run is started again by its name.
`mlflow.json` in the run's folder says what MLflow shall know of the run, the ids that it has there, and whether everything
arrived.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hvp_ray.tracking.journal import read_journal_from
from hvp_ray.tracking.mlflow_store import StoreError, prepare_store

logger = logging.getLogger(__name__)

_MAX_METRICS_PER_CALL = 1000
_MAX_PARAMS_PER_CALL = 100
_MAX_PARAM_LENGTH = 6000
_PAUSE_SECONDS = 2.0
_BUSY_STATUS = (408, 429)
"""HTTP: timeout, too many requests."""
STATE_FILE = "mlflow.json"
_GROUP_TAG = "trained_views"
"""Runs are grouped by this copy of the tag `arm`: MLflow's page derives a group's colour from key and value, and under `arm`
hard and random views would have the same one."""

SHARED_VIEW_TAG = "mlflow.sharedViewState."
"""An experiment tag of this name and a key holds the state of MLflow's page that `?viewStateShareKey=<key>` opens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowRun:
    """What is said about a run when it is made."""

    uri: str
    experiment: str
    artifact_root: str | None
    """Where artifacts of a new experiment go; None: the server decides."""
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
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


class MlflowFeed:
    """See the module. Made and closed by rank 0."""

    def __init__(
        self,
        run: MlflowRun,
        run_dir: Path,
        *,
        keep_state: Callable[[], None] = lambda: None,
        watches_system: bool = True,
    ) -> None:
        """Start.

        Args:
            run: what is said about it.
            run_dir: has the journals.
            keep_state: called by the thread when `mlflow.json` has the ids of a new MLflow run.
            watches_system: log load and memory of this machine: where the run is trained.
        """
        self._run = run
        self._watches_system = watches_system
        self._keep_state = keep_state
        self._state_path = run_dir / STATE_FILE
        known = _read_state(run_dir)
        same_server = known.get("run", {}).get("uri") == run.uri
        ids: dict[str, Any] = {name: known[name] for name in ("run_id", "experiment_id", "described") if name in known}
        self._state: dict[str, Any] = {"run": asdict(run), **(ids if same_server else {}), "complete": False}
        _write_state(self._state_path, self._state)
        self._journals = [
            _JournalPosition(run_dir / "metrics.jsonl", "train/loss"),
            _JournalPosition(run_dir / "evaluations.jsonl", "eval/knn_top1"),
        ]
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
        """Send the rest, the final values and artifacts, and end the MLflow run; tell whether all of it arrived."""
        self._artifacts = artifacts
        self._final = {"status": status, "values": values, "time_ms": int(time.time() * 1000)}
        self._deadline = time.monotonic() + timeout_seconds
        self._closing = True
        self._wake.set()
        if self.is_away:
            logger.warning("MLflow at %s is away; it is waited for, %g s at most", self._run.uri, timeout_seconds)
        self._thread.join(timeout=timeout_seconds)
        done = not self._thread.is_alive() and self._final is None
        if not done:
            logger.warning(
                "MLflow at %s did not receive everything (%s); %s has it. Start the run again by its name to send it",
                self._run.uri,
                self._failure,
                self._journals[0].path,
            )
        return done

    def numbers(self) -> dict[str, float]:
        """Return what `stream.metrics` publishes of this feed; one thread may ask."""
        waiting = sum(journal.num_waiting() for journal in self._journals)
        return {"hvp_ray_mlflow_backlog_records": float(waiting), "hvp_ray_mlflow_outage": float(self.is_away)}

    def _work(self) -> None:
        quiet_mlflow()
        while True:
            try:
                if self._client is None:
                    self._open()
                for journal in self._journals:
                    self._send_new_records(journal)
                self._watch_system()
                if self._closing:
                    self._send_final()
                    self.is_away = False
                    return
                self.is_away = False
                self._num_refusals = 0
            except Exception as error:  # noqa: BLE001 (whatever the server or the network does, training goes on)
                self._client = None  # what the server had before the failure may be gone
                self._failure = _line(error)
                self._num_refusals = self._num_refusals + 1 if _is_refusal(error) else 0
                if not self.is_away:
                    logger.warning("MLflow at %s: %s; kept in the journal, tried again", self._run.uri, self._failure)
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
            # Kept at once: whatever fails from here on, there is no second run.
            self._note(run_id=run_id, experiment_id=experiment_id, described=False)
            for journal in self._journals:
                journal.offset, journal.sent_step = 0, -1
        else:
            for journal in self._journals:
                history = client.get_metric_history(run_id, journal.key)
                journal.sent_step = max((metric.step for metric in history), default=-1)
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
        _write_state(self._state_path, self._state)

    def _describe(self, client: Any, run_id: str) -> None:
        """Send what is said about the run; doing it twice does no harm."""
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
        """Start MLflow's monitor, again where an outage has ended it; it goes on behind the last step that it logged."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if not self._watches_system or self._closing:
            return
        if self._monitor is not None:
            if self._monitor._process is not None and self._monitor._process.is_alive():
                return
            self._client.get_run(self.run_id)  # raises while the server is away: the monitor would begin at step 0 then
            self._monitor.finish()  # sends what it has left
        self._monitor = SystemMetricsMonitor(
            self.run_id,
            sampling_interval=5,
            samples_before_logging=2,
            resume_logging=True,
            tracking_uri=self._run.uri,
        )
        self._monitor.start()

    def _send_new_records(self, journal: "_JournalPosition") -> None:
        """Send what the journal has behind the last position, whole steps at a time; a failed call is sent again."""
        from mlflow.entities import Metric

        pending: list[Metric] = []
        offset = journal.offset
        for end, record in read_journal_from(journal.path, journal.offset):
            step, milliseconds = record["step"], int(record["time"] * 1000)
            metrics = [Metric(key, value, milliseconds, step) for key, value in record["metrics"].items()]
            if step > journal.sent_step:
                if len(pending) + len(metrics) > _MAX_METRICS_PER_CALL:
                    self._send(journal, pending, offset)
                    pending = []
                pending += metrics
            offset = end
        self._send(journal, pending, offset)

    def _send(self, journal: "_JournalPosition", metrics: list[Any], offset: int) -> None:
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            journal.sent_step = metrics[-1].step
        journal.offset = offset

    def _send_final(self) -> None:
        assert self._final is not None
        from mlflow.entities import Metric

        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        metrics = [Metric(key, value, self._final["time_ms"], 0) for key, value in self._final["values"].items()]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            self._final["values"] = {}  # sent: what fails below is tried again without them
        while self._artifacts:
            path = self._artifacts[0]
            folder = "figures" if path.suffix == ".png" else None
            self._client.log_artifact(self.run_id, str(path), artifact_path=folder)
            self._artifacts.pop(0)
        self._client.set_terminated(self.run_id, status=self._final["status"])
        self._note(complete=self._final["status"] == "FINISHED")
        self._final = None


def final_values(summary: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary under the names that they have in MLflow."""
    return {
        f"summary/{name}": float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def final_artifacts(run_dir: Path) -> list[Path]:
    """Return the files of an ended run that MLflow gets."""
    figures = sorted((run_dir / "figures").glob("*.png"))
    return [path for path in (*figures, run_dir / "backbone.safetensors", run_dir / "config.json") if path.exists()]


def lacks_records(run_dir: Path) -> bool:
    """Tell whether MLflow did not get everything of an ended run."""
    return not _read_state(run_dir).get("complete", True)


def catch_up(run_dir: Path) -> dict[str, Any] | None:
    """Send what MLflow lacks of an ended run; return the summary with MLflow's ids, or None: it is still away."""
    run = MlflowRun(**_read_state(run_dir)["run"])
    path = run_dir / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text())
    feed = MlflowFeed(run, run_dir, watches_system=False)
    if not feed.finish(status="FINISHED", artifacts=final_artifacts(run_dir), values=final_values(summary)):
        return None
    summary |= {"mlflow_run_id": feed.run_id, "mlflow_experiment_id": feed.experiment_id}
    _write_state(path, summary)
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
    """Tell whether an error is an answer that waiting does not change."""
    if isinstance(error, StoreError):
        return True
    status_of = getattr(error, "get_http_status_code", None)  # MLflow's errors have one; its import may be what failed
    return status_of is not None and 400 <= status_of() < 500 and status_of() not in _BUSY_STATUS


def _read_state(run_dir: Path) -> dict[str, Any]:
    path = run_dir / STATE_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _write_state(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(temporary, path)


@dataclass(slots=True)
class _JournalPosition:
    """How far a journal was sent."""

    path: Path
    key: str
    """A value that every record has."""
    offset: int = 0
    """Bytes before this were sent."""
    sent_step: int = -1
    _counted: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(bytes looked at, lines in them): of all that was written, and of what was sent."""

    def num_waiting(self) -> int:
        """Return how many records are not sent; reads only what is new since the last call."""
        sent = self._num_lines("sent", self.offset)
        size = self.path.stat().st_size if self.path.exists() else 0
        return max(self._num_lines("written", size) - sent, 0)

    def _num_lines(self, what: str, end: int) -> int:
        start, lines = self._counted.get(what, (0, 0))
        if end > start:
            with self.path.open("rb") as file:
                file.seek(start)
                lines += file.read(end - start).count(b"\n")
            self._counted[what] = (end, lines)
        return lines


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedReport:
    """A comparison's report as MLflow shall have it."""

    uri: str
    experiment: str
    artifact_root: str | None
    run_name: str
    comparison: str
    text: str
    """Description of the run, and of the experiment."""
    metrics: dict[str, float]
    artifacts: tuple[Path, ...]
    figures: tuple[Path, ...]


def publish(report: PublishedReport) -> str | None:
    """Log a report as a run of its own, once for each comparison; return the experiment's id, or None without an answer."""
    quiet_mlflow()
    try:
        return _publish(report)
    except Exception as error:  # noqa: BLE001 (the report is on disk; a server may be away)
        logger.warning("MLflow at %s: %s; the report is not published there", report.uri, _line(error))
        return None


def _publish(report: PublishedReport) -> str:
    import mlflow

    prepare_store(report.uri)
    client = mlflow.MlflowClient(tracking_uri=report.uri)
    experiment_id = open_experiment(client, report.experiment, report.artifact_root)
    wanted = f"tags.comparison = '{report.comparison}' and tags.arm = 'report'"
    found = client.search_runs([experiment_id], filter_string=wanted, max_results=1)
    tags = {"comparison": report.comparison, "arm": "report"}
    run = found[0] if found else client.create_run(experiment_id, run_name=report.run_name, tags=tags)
    run_id = run.info.run_id
    client.set_tag(run_id, "mlflow.note.content", report.text)
    for name, value in report.metrics.items():
        client.log_metric(run_id, name, value)
    for path in report.artifacts:
        client.log_artifact(run_id, str(path))
    for path in report.figures:
        client.log_artifact(run_id, str(path), artifact_path="figures")
    client.set_terminated(run_id)
    for member in client.search_runs([experiment_id], filter_string=f"tags.comparison = '{report.comparison}'"):
        client.set_tag(member.info.run_id, _GROUP_TAG, member.data.tags["arm"])
    client.set_experiment_tag(experiment_id, SHARED_VIEW_TAG + report.comparison, json.dumps(_shared_view(report)))
    client.set_experiment_tag(experiment_id, "mlflow.note.content", f"{report.comparison}: {report.text}")
    return str(experiment_id)


def _shared_view(report: PublishedReport) -> dict[str, Any]:
    """Return the state in which MLflow's page shows a comparison: its runs only, one mean curve for each arm."""
    return {
        "searchFilter": f"tags.comparison = '{report.comparison}' and tags.arm != 'report'",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": _GROUP_TAG}]},
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "SHOWALL",
        "hideEmptyCharts": True,
    }


def open_experiment(client: Any, name: str, artifact_root: str | None) -> str:
    """Return the id of an experiment, which is made if it does not exist.

    MLflow keeps the name of a deleted experiment until it is removed for good. Records then go to `<name>-2`, and so on.
    """
    number, wanted = 1, name
    experiment = client.get_experiment_by_name(name)
    while experiment is not None and experiment.lifecycle_stage != "active":
        number += 1
        wanted = f"{name}-{number}"
        experiment = client.get_experiment_by_name(wanted)
    if number > 1:
        logger.warning(
            "MLflow's experiment %r was deleted; records go to %r. To use %r again, restore it in MLflow or remove it with "
            "`mlflow gc`",
            name,
            wanted,
            name,
        )
    return _make_experiment(client, wanted, artifact_root) if experiment is None else str(experiment.experiment_id)


def _make_experiment(client: Any, name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    kind = {"mlflow.experimentKind": "custom_model_development"}
    try:
        return str(client.create_experiment(name, artifact_location=artifact_root, tags=kind))
    except MlflowException as error:
        made = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
        if made is None:
            raise
        return str(made.experiment_id)  # another run has just made it
