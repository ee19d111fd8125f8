"""The state of one rank of a run: services of its launcher, open files and data, and the objects that it trains with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvp_ray.data.dataset import Dataset
from hvp_ray.data.order import SampleOrder
from hvp_ray.distributed.world import World
from hvp_ray.runs.checkpoint import CheckpointStore
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.online_knn import SubmitKnn
from hvp_ray.runs.ownership import RunClaim
from hvp_ray.runs.progress import ReportProgress, RunSteps, StepClock
from hvp_ray.runs.storage import RunStorage
from hvp_ray.stream.batches import BatchStream, RequestOf
from hvp_ray.stream.metrics import WatchMetrics
from hvp_ray.tracking.run_log import RunLog
from hvp_ray.tracking.unreadable_log import UnreadableLog
from hvp_ray.training.trainee import Trainee

OpenStream = Callable[[RequestOf, int, int], BatchStream]
"""(requests, first step, end step) -> batches of this rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankServices:
    """Services that the launcher provides to a rank."""

    open_stream: OpenStream
    report_progress: ReportProgress
    """Called on rank 0."""
    submit_knn: SubmitKnn
    """Evaluates snapshots during training; called on rank 0."""
    cluster_facts: Callable[[], dict[str, float]]
    """Returns spilled_bytes and num_worker_restarts; called on rank 0 after training."""
    watch_metrics: WatchMetrics = lambda _read: None
    """Publishes this rank's metrics while it trains; by default they are not published."""
    is_stop_requested: Callable[[], bool] = lambda: False
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
