"""A prepared run: what the driver passes to all processes.

Imports no networks, so that processes which only pass it on start fast.
"""

from dataclasses import dataclass
from pathlib import Path

from hvp_ray.config import RunConfig
from hvp_ray.data.inventory import DataInventory
from hvp_ray.resolved_run import ResolvedRun
from hvp_ray.runs.versions import OtherVersions
from hvp_ray.tracking.mlflow import MlflowRun
from hvp_ray.tracking.trackers import TrackedRun


@dataclass(frozen=True, kw_only=True, slots=True)
class RunJob:
    """A run whose folder is prepared: everything that every rank must agree on."""

    config: RunConfig
    token: str
    """Random id. Distinguishes attempts of this job from those of other jobs on the same run."""
    run_name: str
    run_dir: Path
    """Folder of the run's files for this process: the run's folder, or a working copy of it on this machine."""
    run_uri: str | None = None
    """The run's folder on a bucket; None: it is `run_dir`, which all trainers see."""
    run_identity: str
    resolved: ResolvedRun
    trackers: tuple[TrackedRun, ...]
    """One description for each tracker that gets the run."""
    data_fingerprint: str
    test_data: str
    """With `data_fingerprint`, what `open_dataset` checks in a process that opens the data later."""
    inventory: DataInventory | None
    """None on ranks that only read what another one prepared."""
    other_versions: OtherVersions | None = None
    """Versions of libraries that differ from those of the run's identity. None: all versions are equal."""

    @property
    def location(self) -> str:
        """The run's folder for all processes and for messages: path or URI."""
        return self.run_uri or str(self.run_dir)

    @property
    def mlflow_uri(self) -> str | None:
        """Tracking URI; None: MLflow is off."""
        return next((run.uri for run in self.trackers if isinstance(run, MlflowRun)), None)
