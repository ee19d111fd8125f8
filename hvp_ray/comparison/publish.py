"""Publish the report to MLflow: a run with the report as artifact, and the result as the experiment's description."""

from hvp_ray.comparison.arms import get_arm
from hvp_ray.comparison.report import Report
from hvp_ray.comparison.study import Study
from hvp_ray.runs.location import local_output, mlflow_location
from hvp_ray.tracking.mlflow_report import PublishedReport, publish
from hvp_ray.tracking.mlflow_store import ui_command


def publish_report(study: Study, report: Report) -> str | None:
    """Log the report; return a line with the address of its page. None: MLflow is off or unreachable.

    The report stays in its folder. If the server is unreachable, the next start of the comparison publishes it.
    """
    uri, artifact_root = mlflow_location(study.base, local_output(study.base))
    if uri is None:
        return None
    differences = {
        f"comparison/{get_arm(d.arm).label}_minus_{get_arm(d.reference).label}_points".replace("-", "_"): 100 * d.mean
        for d in report.primary.differences
    }
    experiment_id = publish(
        PublishedReport(
            uri=uri,
            experiment=study.base.tracking.experiment,
            artifact_root=artifact_root,
            run_name=f"{study.name}-report",
            comparison=study.name,
            text=report.sentence,
            metrics=differences,
            artifacts=(report.html_path, report.json_path),
            figures=report.figures,
        )
    )
    if experiment_id is None:
        return None
    return (
        f"curves   `{ui_command(uri)}`, then http://127.0.0.1:5000/#/experiments/{experiment_id}/runs"
        f"?viewStateShareKey={study.name}&compareRunsMode=CHART&workflowType=machine_learning"
    )
