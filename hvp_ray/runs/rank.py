"""One rank of a run from start to end, without Ray: open, restore, train, and on rank 0 evaluate and publish.

`launch/driver.py` calls this inside Ray Train's workers, `launch/local.py` in a plain process or under torchrun.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import time
from typing import Any

import torch

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.data.order import SampleOrder
from hvp_ray.distributed.world import World, gather_over_ranks
from hvp_ray.errors import CheckpointError
from hvp_ray.files import place_in, write_file
from hvp_ray.local_cache import BACKBONE, with_local_weights
from hvp_ray.methods.backbones import export_backbone
from hvp_ray.runs.after_training import TRAINED, AfterTraining, StopRequestedError
from hvp_ray.runs.checkpoint import CheckpointStore
from hvp_ray.runs.initial_run import build_method_at_start
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.opened_rank import OpenedRank, RankServices, RestoredRank
from hvp_ray.runs.ownership import RunClaim
from hvp_ray.runs.progress import RunSteps, StepClock
from hvp_ray.runs.recorder import RankRecorder, RunRecorder
from hvp_ray.runs.storage import RunStorage
from hvp_ray.runs.summary import knn_results, summarize
from hvp_ray.runs.versions import record_versions
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.tracking.run_log import ATTEMPTS, RunLog, export_records, next_attempt
from hvp_ray.tracking.unreadable_log import UnreadableLog
from hvp_ray.training.loop import LoopResult, run_loop
from hvp_ray.training.trainee import Trainee, build_trainee, build_untrained_method

logger = logging.getLogger(__name__)


def train_rank(job: RunJob, world: World, device: torch.device, services: RankServices) -> dict[str, Any] | None:
    """Train this rank to the end; return the summary on rank 0 of a finished run, else None.

    Args:
        job: the run.
        world: this rank.
        device: device to train on.
        services: what the launcher provides.

    Raises:
        CheckpointError: the run's folder or its checkpoints cannot be used, or another process is training the run.
        LostRunError: another process has taken the run over.
        TrainingError: the loss is not finite, or a collapse has lasted for `training.max_collapsed_steps`.
        StageError, DataError: no batches come, or the data is too damaged.
    """
    with contextlib.ExitStack() as ends:
        claim = ends.enter_context(RunClaim(job.location, job=job.token)) if world.rank == 0 else None
        number = agree_on_claim(job, claim, device)  # no rank reads the run before it is claimed
        if claim is not None:
            record_versions(job.location, job.other_versions)
        storage = ends.enter_context(RunStorage(job.run_dir, job.run_uri, rank=world.rank, attempt=number))
        rank = _open(dataclasses.replace(job, run_dir=storage.folder), claim, number, storage, world, device)
        restored = _restore(rank, number, services)
        make_recorder = RunRecorder if world.rank == 0 else RankRecorder
        with make_recorder(rank, restored, services) as recorder:
            result = _train(rank, restored, recorder)
            if not isinstance(recorder, RunRecorder) or result.stopped_early:
                return None
            restored = _with_whole_encoder(rank, restored)
            try:
                after, summary = _evaluate(rank, restored, recorder, result, services)
            except StopRequestedError:
                storage.push()
                return None
            return _publish(rank, recorder, after, summary)


def agree_on_claim(job: RunJob, claim: RunClaim | None, device: torch.device) -> int:
    """Return the number of rank 0's claim, on all ranks.

    Raises:
        CheckpointError: on all ranks: they have different versions of libraries.
    """
    versions = {} if job.other_versions is None else dict(job.other_versions.versions)
    digest = int(hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:15], 16)
    own = torch.tensor([0 if claim is None else claim.number, digest], device=device)
    numbers, digests = gather_over_ranks(own).T.tolist()
    if len(set(digests)) > 1:
        raise CheckpointError(
            f"the trainers have different versions of libraries. Different from those that the run began with are, for the "
            f"trainer on {socket.gethostname()}: {versions or 'none'}. Install equal versions on all nodes, then start the "
            f"run again with its name"
        )
    return int(numbers[0])


def _open(
    job: RunJob, claim: RunClaim | None, number: int, storage: RunStorage, world: World, device: torch.device
) -> OpenedRank:
    config = job.config
    dataset = open_dataset(config.data, fingerprint=job.data_fingerprint, test_data=job.test_data)
    checkpoints = CheckpointStore(
        place_in(job.location, "checkpoints"),
        run_identity=job.run_identity,
        keep=config.training.keep_checkpoints,
        attempt=number,
        check_owner=_no_check if claim is None else claim.check,
    )
    return OpenedRank(
        job=job,
        claim=claim,
        storage=storage,
        world=world,
        device=device,
        dataset=dataset,
        order=build_order(config, dataset),
        checkpoints=checkpoints,
    )


def _no_check() -> None:
    """Other ranks than 0 commit nothing."""


def _restore(rank: OpenedRank, number: int, services: RankServices) -> RestoredRank:
    """Load the newest checkpoint, begin an attempt in the log, and request the first batches."""
    job, config, world = rank.job, rank.job.config, rank.world
    checkpoint = rank.checkpoints.load_newest(map_location="cpu")
    first_step = checkpoint.step if checkpoint is not None else 0
    attempt = agree_on_attempt(first_step, max(number, next_attempt(job.run_dir)), rank.device)
    check_folder_is_shared(job)  # after a collective: the process that prepares the run has done so
    steps = RunSteps(
        first_step=first_step,
        num_steps=config.training.total_steps(rank.order.steps_per_epoch),
        steps_per_epoch=rank.order.steps_per_epoch,
    )
    build_method = build_method_at_start if checkpoint is None else build_untrained_method
    trainee = build_trainee(with_local_weights(config), world, rank.device, checkpoint, build_method)
    log = RunLog(job.run_dir, attempt=attempt, first_step=first_step)
    if world.rank == 0:
        _warn_of_long_warmup(config, steps)
        log.write(ATTEMPTS, _describe_attempt(job, first_step, world))
        rank.storage.push()
    unreadable = UnreadableLog(
        log,
        rank=world.rank,
        images_per_rank=config.training.images_per_step // world.num_ranks,
        max_fraction=config.data.max_unreadable_fraction,
    )
    request_of = requests_of_rank(
        config,
        rank.order,
        rank=world.rank,
        num_ranks=world.num_ranks,
        known_replacements=unreadable.known,
        predictor=trainee.predictor,
    )
    stream = services.open_stream(request_of, first_step, steps.num_steps)
    clock = StepClock(lambda: stream.stats.wait_seconds)
    return RestoredRank(trainee=trainee, steps=steps, log=log, unreadable=unreadable, stream=stream, clock=clock)


def _train(rank: OpenedRank, restored: RestoredRank, recorder: RankRecorder) -> LoopResult:
    steps = restored.steps
    try:
        return run_loop(
            restored.trainee,
            restored.stream,
            rank.job.config,
            recorder,
            first_step=steps.first_step,
            num_steps=steps.num_steps,
            steps_per_epoch=steps.steps_per_epoch,
        )
    finally:
        restored.stream.close()


def _with_whole_encoder(rank: OpenedRank, restored: RestoredRank) -> RestoredRank:
    """Return a trainee whose encoder this rank can use alone: that of the last checkpoint, if this one is sharded."""
    sharded = restored.trainee
    if not sharded.is_sharded:
        return restored
    sharded.optimizer.state.clear()  # makes room
    sharded.optimizer.zero_grad(set_to_none=True)
    method = build_untrained_method(with_local_weights(rank.job.config))
    method.load_state_dict(rank.checkpoints.load(restored.steps.num_steps).method)
    return dataclasses.replace(restored, trainee=dataclasses.replace(sharded, method=method.to(rank.device)))


def _evaluate(
    rank: OpenedRank, restored: RestoredRank, recorder: RunRecorder, result: LoopResult, services: RankServices
) -> tuple[AfterTraining, dict[str, Any]]:
    """Export the encoder, evaluate it, draw figures and the page; return what was done, and the summary.

    The weights are in a checkpoint, so no failure of an evaluation ends the run.

    Raises:
        StopRequestedError: the run was asked to stop.
    """
    job, config, trainee = rank.job, rank.job.config, restored.trainee
    rank.checkpoints.check_owner()
    rank.storage.pull_decisions()
    measured = summarize(rank, restored, result) | {"num_collapse_warnings": recorder.collapse.num_warnings}
    export_backbone(trainee.method.encoder, config.encoder, job.run_dir / BACKBONE)
    rank.storage.push()
    after = AfterTraining(
        job.run_dir,
        measured,
        recorder.problems,
        may_continue=not result.step_seconds,
        keep=lambda: rank.storage.push_file(TRAINED),
        is_stop_requested=services.is_stop_requested,
        check_owner=rank.checkpoints.check_owner,
    )
    after.summary |= {name: measured[name] for name in ("num_resumes", "other_versions")}
    summary = after.summary | {"spilled_bytes": None, "num_worker_restarts": None}
    summary |= after.attempt("the cluster's metrics", services.cluster_facts) or {}
    if config.tracking.num_figure_images:
        after.attempt("figures", lambda: _draw_figures(rank, trainee))
        after.attempt("figure of nearest neighbours", lambda: _draw_neighbours(rank, trainee))
    summary |= knn_results(config, rank.dataset, trainee, after)  # after the figures, because it takes the most memory
    recorder.complete_log(summary)
    if config.tracking.num_figure_images:
        after.attempt("the page", lambda: _write_page(job, summary, after.problems))
    return after, summary


# These import what they need when they are called, because Matplotlib would delay the first step.


def _draw_figures(rank: OpenedRank, trainee: Trainee) -> None:
    from hvp_ray.runs.final_figures import draw_figures

    draw_figures(rank.job.config, rank.dataset, trainee, rank.job.run_dir)


def _draw_neighbours(rank: OpenedRank, trainee: Trainee) -> None:
    from hvp_ray.runs.neighbours import draw_nearest_neighbours

    path = rank.job.run_dir / "figures" / "neighbours.png"
    draw_nearest_neighbours(rank.job.config, rank.dataset, trainee, path)


def _write_page(job: RunJob, summary: dict[str, Any], problems: list[str]) -> None:
    from hvp_ray.runs.page import write_page

    write_page(job, summary, problems)


def _publish(rank: OpenedRank, recorder: RunRecorder, after: AfterTraining, summary: dict[str, Any]) -> dict[str, Any]:
    """End the run in all trackers and write `summary.json`, which says that the run has finished."""
    run_dir = rank.job.run_dir
    rank.checkpoints.check_owner()
    summary |= recorder.finish(summary) | {"problems": after.problems}
    rank.checkpoints.check_owner()
    export_records(run_dir)
    write_file(str(run_dir / "summary.json"), (json.dumps(summary, indent=1) + "\n").encode())
    after.finish()
    rank.storage.push()
    return summary


def agree_on_attempt(first_step: int, attempt: int, device: torch.device) -> int:
    """Return the number of this attempt, the same on all ranks, which must all begin at the same step.

    Raises:
        CheckpointError: on all ranks: the ranks do not see the same checkpoints.
    """
    starts, attempts = gather_over_ranks(torch.tensor([first_step, attempt], device=device)).T.tolist()
    if len(set(starts)) > 1:
        raise CheckpointError(
            f"the trainers would begin at different steps ({starts}, by rank), because they do not see the same checkpoints; "
            f"set run.output to a folder that all of them share, or to a URI, and start the run again with its name"
        )
    return int(max(attempts))


def check_folder_is_shared(job: RunJob) -> None:
    """Check that this process sees the folder that the driver prepared, and not one on another node's disk.

    Raises:
        CheckpointError: it does not; it would begin at step 0 while others resume from a checkpoint.
    """
    if job.run_uri is not None:
        return
    try:
        identity = json.loads((job.run_dir / "config.json").read_text())["run_identity"]
    except (OSError, ValueError, KeyError, TypeError):
        identity = None
    if identity != job.run_identity:
        found = "no config.json" if identity is None else "another run's config.json"
        raise CheckpointError(
            f"the trainer on {socket.gethostname()} finds {found} in {job.run_dir}, which the driver made: the nodes do not "
            f"share this folder. Set run.output to a folder on a disk that all trainers and the driver see, or to a URI "
            f"(s3://, gs://, ...)"
        )


def build_order(config: RunConfig, dataset: Dataset) -> SampleOrder:
    """Return the order of the training samples.

    Raises:
        DataError: fewer images than one step needs.
    """
    return SampleOrder(
        seed=config.run.seed,
        sample_ids=dataset.training_ids,
        images_per_step=config.training.images_per_step,
        block_starts=dataset.source.block_starts,
        window_images=dataset.shuffle_window_images(config.data),
    )


def _warn_of_long_warmup(config: RunConfig, steps: RunSteps) -> None:
    if config.optimizer.warmup_epochs * steps.steps_per_epoch >= steps.num_steps:
        logger.warning(
            "optimizer.warmup_epochs=%g covers the whole run of %d steps: the learning rate only rises",
            config.optimizer.warmup_epochs,
            steps.num_steps,
        )


def _describe_attempt(job: RunJob, first_step: int, world: World) -> dict[str, Any]:
    process = {"process_id": os.getpid(), "host": socket.gethostname(), "num_trainers": world.num_ranks}
    others = {} if job.other_versions is None else {"other_versions": job.other_versions.to_dict()}
    return {"step": first_step, "time": time.time(), **process, **others}
