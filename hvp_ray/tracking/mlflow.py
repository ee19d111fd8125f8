"""MLflow as a tracker of a run: description, metrics, load of the machine, figures and encoder.

A user may delete a run in MLflow's page, so connecting looks the run up. If it is gone, a new run gets everything.
"""

import importlib.util
import itertools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hvp_ray.tracking.feed import Ending, Feed, Record
from hvp_ray.tracking.mlflow_store import StoreError, prepare_store
from hvp_ray.tracking.run_log import EVALUATIONS, METRICS

logger = logging.getLogger(__name__)

_MAX_PARAMS_PER_CALL = 100
_MAX_PARAM_LENGTH = 6000
_BUSY_STATUS = (408, 429)
"""HTTP: timeout, too many requests."""
_KEYS = {METRICS: "train/loss", EVALUATIONS: "eval/knn_top1"}
"""Kind of records -> a metric that every record has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowRun:
    """The description of a run that is sent to MLflow."""

    place: ClassVar[tuple[str, ...]] = ("uri",)

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

    @property
    def title(self) -> str:
        """Name of the tracker and of the place, for messages."""
        return f"MLflow at {self.uri}"


def mlflow_is_installed() -> bool:
    """Tell whether the package is installed, without the seconds of importing it."""
    return importlib.util.find_spec("mlflow") is not None


def quiet_mlflow() -> None:
    """Switch MLflow's telemetry and long retries off, before it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)


class MlflowFeed(Feed):
    """Feeds one run of MLflow."""

    state_file = "mlflow.json"

    def __init__(
        self,
        run: MlflowRun,
        run_dir: Path,
        *,
        keep_state: Callable[[], None] = lambda: None,
        watches_system: bool = True,
    ) -> None:
        """See `Feed`."""
        self._run = run
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._monitor: Any = None
        self._client: Any = None
        super().__init__(run, run_dir, keep_state=keep_state, watches_system=watches_system)

    def connect(self) -> dict[str, int]:
        """Look the run up or create it, and describe it."""
        quiet_mlflow()
        import mlflow

        prepare_store(self._run.uri)
        # Never `set_tracking_uri`: it sets MLFLOW_TRACKING_URI, which later runs of this process would follow.
        client = mlflow.MlflowClient(tracking_uri=self._run.uri)
        run_id: str = self._state.get("run_id", "")
        experiment_id = _experiment_of(client, run_id) if run_id else None
        sent: dict[str, int] = {}
        if experiment_id is None:
            experiment_id = open_experiment(client, self._run.experiment, self._run.artifact_root)
            run = client.create_run(experiment_id, run_name=self._run.run_name, tags=self._run.tags)
            run_id = run.info.run_id
            # Written at once, so that a failure from here on leads to no second run.
            self._note(run_id=run_id, experiment_id=experiment_id, described=False)
        else:
            for kind, key in _KEYS.items():
                history = client.get_metric_history(run_id, key)
                sent[kind] = max((metric.step for metric in history), default=-1)
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
        return sent

    def send(self, kind: str, records: list[Record]) -> None:
        """Send records in one call."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, int(record["time"] * 1000), record["step"])
            for record in records
            for key, value in record["metrics"].items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def tend(self) -> None:
        """Start MLflow's monitor, or restart it after an outage; it continues after the last step that it logged."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if not self._watches_system:
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

    def leave(self) -> None:
        """End MLflow's monitor, which sends its rest."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def end(self, ending: Ending) -> None:
        """Send the rest of the monitor, final values and artifacts, and end the run."""
        from mlflow.entities import Metric

        self.leave()
        metrics = [Metric(key, value, int(ending.time * 1000), 0) for key, value in ending.values.items()]
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            ending.values = {}
        while ending.artifacts:
            path = ending.artifacts[0]
            folder = "figures" if path.suffix == ".png" else None
            self._client.log_artifact(self.run_id, str(path), artifact_path=folder)
            ending.artifacts.pop(0)
        self._client.set_terminated(self.run_id, status=ending.status)

    def is_refusal(self, error: Exception) -> bool:
        """Tell whether an error is an answer that a retry does not change."""
        if isinstance(error, StoreError):
            return True
        status_of = getattr(error, "get_http_status_code", None)  # MLflow's errors have one; its import may have failed
        return status_of is not None and 400 <= status_of() < 500 and status_of() not in _BUSY_STATUS

    def facts(self) -> dict[str, Any]:
        """Return the ids of the run."""
        return {"mlflow_run_id": self.run_id, "mlflow_experiment_id": self.experiment_id}

    def numbers(self) -> dict[str, float]:
        """Return what `stream.metrics` publishes of this feed; one thread may call this."""
        waiting = float(self.num_waiting())
        return {"hvp_ray_mlflow_backlog_records": waiting, "hvp_ray_mlflow_outage": float(self.is_away)}

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
