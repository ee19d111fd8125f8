"""A prepared run, and what one rank of it has once it is opened and restored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.inventory import DataInventory
from hvp_ray.data.order import SampleOrder
from hvp_ray.distributed.world import World
from hvp_ray.resolved_run import ResolvedRun
from hvp_ray.runs.checkpoint import CheckpointStore
from hvp_ray.runs.online_knn import AskKnn
from hvp_ray.runs.ownership import RunClaim
from hvp_ray.runs.progress import ReportProgress, RunSteps, StepClock
from hvp_ray.runs.storage import RunStorage
from hvp_ray.runs.versions import OtherVersions
from hvp_ray.stream.batches import BatchStream, RequestOf
from hvp_ray.stream.metrics import WatchNumbers
from hvp_ray.tracking.mlflow import MlflowRun
from hvp_ray.tracking.run_log import RunLog
from hvp_ray.tracking.trackers import TrackedRun
from hvp_ray.tracking.unreadable_log import UnreadableLog
from hvp_ray.training.trainee import Trainee

OpenStream = Callable[[RequestOf, int, int], BatchStream]
"""(requests, first step, end step) -> batches of this rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunJob:
    """A run whose folder is prepared: everything that every rank must agree on."""

    config: RunConfig
    token: str
    """Random; tells attempts of this job from those of another job that got the same run."""
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
    """Versions of libraries that differ from those of the run's identity. None: none does."""

    @property
    def location(self) -> str:
        """The run's folder for all processes and for messages: path or URI."""
        return self.run_uri or str(self.run_dir)

    @property
    def mlflow_uri(self) -> str | None:
        """Tracking URI; None: MLflow is off."""
        return next((run.uri for run in self.trackers if isinstance(run, MlflowRun)), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankServices:
    """Services that the launcher provides to a rank."""

    open_stream: OpenStream
    report_progress: ReportProgress
    """Called on rank 0."""
    ask_knn: AskKnn
    """Evaluates snapshots during training; called on rank 0."""
    cluster_facts: Callable[[], dict[str, float]]
    """Returns spilled_bytes and num_worker_restarts; called on rank 0 after training."""
    watch_numbers: WatchNumbers = lambda _read: None
    """Publishes this rank's metrics while it trains; by default they are not published."""
    is_stop_asked: Callable[[], bool] = lambda: False
    """Returns whether the run was asked to stop; called on rank 0 between the parts of the evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedRank:
    """One rank of a run whose files and data are open."""

    job: RunJob
    claim: RunClaim | None
    """None on other ranks than 0."""
    storage: RunStorage
    world: World
    device: torch.device
    dataset: Dataset
    order: SampleOrder
    checkpoints: CheckpointStore


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoredRank:
    """Objects that a rank trains with, at the state of its newest checkpoint or at the start."""

    trainee: Trainee
    steps: RunSteps
    log: RunLog
    unreadable: UnreadableLog
    stream: BatchStream
    clock: StepClock
