"""A comparison's report in MLflow: a run of its own, with one mean curve for each arm on the experiment's page."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvp_ray.errors import first_line
from hvp_ray.tracking.mlflow import open_experiment, quiet_mlflow
from hvp_ray.tracking.mlflow_store import prepare_store

logger = logging.getLogger(__name__)

_GROUP_TAG = "trained_views"
"""Runs are grouped by this copy of the tag `arm`. MLflow derives a group's colour from key and value, and under `arm`
hard and random views would share a colour."""

_SHARED_VIEW_TAG = "mlflow.sharedViewState."
"""An experiment tag of this name and a key holds the state of MLflow's page that `?viewStateShareKey=<key>` opens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedReport:
    """The report of a comparison, and its destination in MLflow."""

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
    """Log a report as one run per comparison; return the experiment's id, or None if the server does not answer."""
    quiet_mlflow()
    try:
        return _publish(report)
    except Exception as error:  # noqa: BLE001 (the report is on disk; the server may be down)
        logger.warning("MLflow at %s: %s; the report is not published there", report.uri, first_line(error))
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
    client.set_experiment_tag(experiment_id, _SHARED_VIEW_TAG + report.comparison, json.dumps(_shared_view(report)))
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
