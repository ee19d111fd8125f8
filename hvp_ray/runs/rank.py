"""One rank of a run from start to end, without Ray: restore, train, and on rank 0 evaluate and report.

`launch/driver.py` calls this inside Ray Train's workers, `launch/local.py` in a plain process or under torchrun.
"""

import dataclasses
import json
import logging
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hvp_ray.config import RunConfig, config_to_dict, flatten
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.data.inventory import DataInventory
from hvp_ray.data.order import SampleOrder
from hvp_ray.distributed.world import World, gather_over_ranks, mean_over_ranks
from hvp_ray.errors import CheckpointError
from hvp_ray.evaluation.report import evaluate_encoder, evaluate_pixels, load_knn_data
from hvp_ray.methods.backbones import export_backbone
from hvp_ray.remote_files import place_in, write_file
from hvp_ray.resolved_run import ResolvedRun
from hvp_ray.stream.batches import BatchStream, RequestOf, requests_of_rank
from hvp_ray.stream.isolation import CRASHES_DECODER
from hvp_ray.stream.metrics import WatchNumbers
from hvp_ray.stream.stats import StreamStats
from hvp_ray.tracking.journal import Journal, UnreadableLog, read_journal, truncate_journal
from hvp_ray.tracking.mlflow import STATE_FILE, MlflowFeed, MlflowRun, final_artifacts, final_values
from hvp_ray.tracking.selection_log import SelectionLogWriter
from hvp_ray.runs.after_training import TRAINED, AfterTraining, StopAskedError
from hvp_ray.runs.checkpoint import CheckpointStore, weights_digest
from hvp_ray.training.loop import LoopResult, run_loop
from hvp_ray.runs.online_knn import AskKnn, KnnDuringTraining
from hvp_ray.runs.progress import ReportProgress
from hvp_ray.runs.recorder import RunRecorder
from hvp_ray.runs.figures import draw_figures
from hvp_ray.runs.storage import BACKBONE, RunStorage
from hvp_ray.training.trainee import build_trainee, build_untrained_method
from hvp_ray.training.step import Trainee

logger = logging.getLogger(__name__)

OpenStream = Callable[[RequestOf, int, int], BatchStream]
"""(requests, first step, end step) -> batches of this rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunJob:
    """A run whose folder is prepared: everything that every rank must agree on."""

    config: RunConfig
    run_name: str
    run_dir: Path
    """Where this process reads and writes the run's files: the run's folder, or a working copy of it on this machine."""
    run_uri: str | None = None
    """The run's folder on a bucket; None: it is `run_dir`, which all trainers see."""
    run_identity: str
    resolved: ResolvedRun
    mlflow_uri: str | None
    mlflow_artifact_root: str | None
    tags: dict[str, str]
    data_fingerprint: str
    test_data: str
    """With `data_fingerprint`, what `open_dataset` checks in a process that opens the data later."""
    inventory: DataInventory | None
    """None on ranks that only read what another one prepared."""

    @property
    def location(self) -> str:
        """The run's folder as all processes and people know it: path or URI."""
        return self.run_uri or str(self.run_dir)


def train_rank(
    job: RunJob,
    world: World,
    device: torch.device,
    *,
    open_stream: OpenStream,
    report_progress: ReportProgress,
    ask_knn: AskKnn,
    cluster_facts: Callable[[], dict[str, float]],
    watch_numbers: WatchNumbers = lambda _read: None,
    is_stop_asked: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train this rank to the end; return the summary on rank 0 of a finished run, else None.

    Args:
        job: the run.
        world: this rank.
        device: what to train on.
        open_stream: where batches come from.
        report_progress: see `recorder.ReportProgress`.
        ask_knn: who evaluates snapshots during training.
        cluster_facts: spilled_bytes and num_worker_restarts so far.
        watch_numbers: who publishes this rank's numbers while it trains; by default nobody.
        is_stop_asked: tells rank 0 between the parts of the evaluation whether the run was asked to stop.
    """
    with RunStorage(job.run_dir, job.run_uri, rank=world.rank) as storage:
        return _train_rank(
            dataclasses.replace(job, run_dir=storage.folder),
            storage,
            world,
            device,
            open_stream=open_stream,
            report_progress=report_progress,
            ask_knn=ask_knn,
            cluster_facts=cluster_facts,
            watch_numbers=watch_numbers,
            is_stop_asked=is_stop_asked,
        )


def _train_rank(
    job: RunJob,
    storage: RunStorage,
    world: World,
    device: torch.device,
    *,
    open_stream: OpenStream,
    report_progress: ReportProgress,
    ask_knn: AskKnn,
    cluster_facts: Callable[[], dict[str, float]],
    watch_numbers: WatchNumbers,
    is_stop_asked: Callable[[], bool],
) -> dict[str, Any] | None:
    config = job.config
    dataset = open_dataset(config.data, fingerprint=job.data_fingerprint, test_data=job.test_data)
    order = build_order(config, dataset)
    num_steps = config.training.num_steps or config.training.epochs * order.steps_per_epoch
    store = CheckpointStore(
        place_in(job.location, "checkpoints"), run_identity=job.run_identity, keep=config.training.keep_checkpoints
    )
    if world.rank == 0 and config.optimizer.warmup_epochs * order.steps_per_epoch >= num_steps:
        logger.warning(
            "optimizer.warmup_epochs=%g covers the whole run of %d steps: the learning rate only rises",
            config.optimizer.warmup_epochs,
            num_steps,
        )
    checkpoint = store.load_newest(map_location="cpu")
    first_step = checkpoint.step if checkpoint is not None else 0
    check_ranks_agree(first_step, device)
    check_folder_is_shared(job)  # behind a collective: the process that prepares the run has done so
    trainee = build_trainee(config, world, device, checkpoint)
    unreadable = UnreadableLog(
        job.run_dir,
        rank=world.rank,
        images_per_rank=config.training.images_per_step // world.num_ranks,
        max_fraction=config.data.max_unreadable_fraction,
    )
    request_of = requests_of_rank(
        config, order, rank=world.rank, num_ranks=world.num_ranks, known_replacements=unreadable.known
    )
    stream = open_stream(request_of, first_step, num_steps)
    journal = feed = selection_log = knn = None
    problems: list[str] = []
    if world.rank == 0:
        steps_per_epoch = order.steps_per_epoch
        selection_log = SelectionLogWriter(
            job.run_dir, config, run_name=job.run_name, steps_per_epoch=steps_per_epoch, first_step=first_step
        )
        knn = KnnDuringTraining(
            job.run_dir,
            config,
            trainee.method.encoder,
            ask_knn,
            problems,
            steps_per_epoch=steps_per_epoch,
            num_steps=num_steps,
            first_step=first_step,
        )
        journal_path = job.run_dir / "metrics.jsonl"
        truncate_journal(journal_path, last_step=first_step)
        journal = Journal(journal_path)
        feed = _start_feed(job, storage)
        _note_attempt(job.run_dir, first_step, world.num_ranks)
        storage.push()
    recorder = RunRecorder(
        config,
        trainee=trainee,
        store=store,
        stats=stream.stats,
        unreadable=unreadable,
        journal=journal,
        selection_log=selection_log,
        knn=knn,
        report_progress=report_progress,
        before_commit=lambda: push_on_all_ranks(storage, job, device),
        num_steps=num_steps,
        steps_per_epoch=order.steps_per_epoch,
    )
    watch_numbers(recorder.numbers)
    if feed is not None:
        watch_numbers(feed.numbers)
    try:
        result = run_loop(
            trainee,
            stream,
            config,
            recorder,
            first_step=first_step,
            num_steps=num_steps,
            steps_per_epoch=order.steps_per_epoch,
        )
    except BaseException:
        if feed is not None:
            feed.finish(status="FAILED", artifacts=[], values={}, timeout_seconds=5.0)
        raise
    finally:
        stream.close()
        unreadable.close()
    if world.rank != 0:
        return None
    assert journal is not None and knn is not None and selection_log is not None
    journal.close()
    selection_log.flush()
    if result.stopped_early:
        if feed is not None:
            feed.finish(status="KILLED", artifacts=[], values={}, timeout_seconds=1.0)
        return None
    storage.pull_decisions()
    summary = _summarize(job, dataset, order, trainee, stream.stats, result)
    unreadable_ids = _unreadable_ids(job.run_dir)
    summary |= {
        "num_unreadable_images": len(unreadable_ids),
        "num_quarantined_images": sum(reason == CRASHES_DECODER for reason in unreadable_ids.values()),
        "num_collapse_warnings": recorder.collapse.num_warnings,
    }
    export_backbone(trainee.method.encoder, config.method.backbone, job.run_dir / BACKBONE)
    storage.push()
    after = AfterTraining(
        job.run_dir,
        summary,
        problems,
        may_continue=not result.step_seconds,
        keep=lambda: storage.push_file(TRAINED),
        is_stop_asked=is_stop_asked,
    )
    after.summary["num_resumes"] = summary["num_resumes"]
    try:
        summary = _report(job, dataset, trainee, feed, knn, after, cluster_facts)
    except StopAskedError:
        storage.push()
        if feed is not None:
            feed.finish(status="KILLED", artifacts=[], values={}, timeout_seconds=1.0)
        return None
    storage.push(is_final=True)
    return summary


def check_folder_is_shared(job: RunJob) -> None:
    """Check that this process sees the folder that the driver prepared: another node's disk has another one.

    Raises:
        CheckpointError: it does not; going on would begin at step 0 while others go on from a checkpoint.
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


def check_ranks_agree(first_step: int, device: torch.device) -> None:
    """Check that all ranks begin at the same step.

    Raises:
        CheckpointError: on all ranks, where they do not: the ranks do not see the same checkpoints.
    """
    steps = gather_over_ranks(torch.tensor([first_step], device=device)).flatten().tolist()
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the trainers would begin at different steps ({steps}, by rank), because they do not see the same checkpoints; "
            f"set run.output to a folder that all of them share, or to a URI, and start the run again with its name"
        )


def push_on_all_ranks(storage: RunStorage, job: RunJob, device: torch.device) -> None:
    """Bring to the bucket what a checkpoint presupposes; every rank returns when every rank has done so.

    Raises:
        CheckpointError: on all ranks, where one of them could not.
    """
    if job.run_uri is None:
        return
    failure: CheckpointError | None = None
    try:
        storage.push()
    except CheckpointError as error:
        failure = error
    num_failed = mean_over_ranks(torch.tensor(float(failure is not None), device=device))
    if failure is not None:
        raise failure
    if float(num_failed) > 0.0:
        raise CheckpointError(f"another trainer could not write to {job.run_uri}; no checkpoint was written")


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


def _start_feed(job: RunJob, storage: RunStorage) -> MlflowFeed | None:
    if job.mlflow_uri is None:
        return None
    run = MlflowRun(
        uri=job.mlflow_uri,
        experiment=job.config.tracking.experiment,
        artifact_root=job.mlflow_artifact_root,
        run_name=job.run_name,
        params=flatten(config_to_dict(job.config)),
        tags=job.tags,
        dataset_name=Path(job.config.data.source).name,
        dataset_source=job.config.data.source,
        dataset_digest=job.data_fingerprint,
    )
    # The ids go to the bucket at once: an attempt that finds none makes a second MLflow run.
    return MlflowFeed(run, job.run_dir, keep_state=lambda: storage.push_file(STATE_FILE))


def _note_attempt(run_dir: Path, first_step: int, num_trainers: int) -> None:
    attempts = Journal(run_dir / "attempts.jsonl")
    process = {"process_id": os.getpid(), "host": socket.gethostname(), "num_trainers": num_trainers}
    attempts.write({"step": first_step, "time": time.time(), **process})
    attempts.close()


def _unreadable_ids(run_dir: Path) -> dict[int, str]:
    """Return id -> reason."""
    return {
        replacement["unreadable_id"]: replacement["reason"]
        for path in run_dir.glob("unreadable-rank-*.jsonl")
        for record in read_journal(path)
        for replacement in record["replacements"]
    }


def _summarize(
    job: RunJob,
    dataset: Dataset,
    order: SampleOrder,
    trainee: Trainee,
    stats: StreamStats,
    result: LoopResult,
) -> dict[str, Any]:
    config = job.config
    records = list(read_journal(job.run_dir / "metrics.jsonl"))
    attempts = list(read_journal(job.run_dir / "attempts.jsonl"))
    steps_here = len(result.step_seconds)
    images_here = steps_here * config.training.images_per_step
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if trainee.device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(trainee.device)

    def mean_value(name: str) -> float | None:
        values = [record["metrics"][name] for record in records if name in record["metrics"]]
        return float(np.mean(values)) if values else None

    return {
        "run_name": job.run_name,
        "recipe": config.recipe,
        "method": config.method.name,
        "selection_rule": config.selection.rule,
        "seed": config.run.seed,
        "num_steps": result.num_steps_done,
        "num_epochs": result.num_steps_done / order.steps_per_epoch,
        "images_seen": result.num_steps_done * config.training.images_per_step,
        "num_training_images": len(dataset.training_ids),
        "data": None if job.inventory is None else job.inventory.to_dict(),
        "train_seconds": result.train_seconds,
        "images_per_second": images_here / result.train_seconds if steps_here else 0.0,
        "first_batch_seconds": stats.first_batch_seconds,
        "data_wait_fraction": stats.wait_seconds / result.train_seconds if steps_here else 0.0,
        "step_seconds_median": statistics.median(result.step_seconds) if steps_here else 0.0,
        "peak_memory_bytes": peak_bytes,
        "view_bytes": stats.num_bytes,
        "num_batches_repeated": stats.num_retries,
        "num_resumes": len(attempts) - 1,
        "loss_first": records[0]["metrics"]["train/loss"] if records else None,
        "loss_last": records[-1]["metrics"]["train/loss"] if records else None,
        "chosen_iou_mean": mean_value("selection/chosen_iou"),
        "other_iou_mean": mean_value("selection/other_iou"),
        "weights_digest": weights_digest(trainee.method.state_dict()),
        "run_identity": job.run_identity,
        "renderer": job.resolved.renderer,
        "device": trainee.device.type,
        "num_trainers": config.cluster.num_trainers,
    }


def _report(
    job: RunJob,
    dataset: Dataset,
    trainee: Trainee,
    feed: MlflowFeed | None,
    knn: KnnDuringTraining,
    after: AfterTraining,
    cluster_facts: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Evaluate, draw, and end the MLflow run; the weights are in a checkpoint, and the encoder is exported."""
    config = job.config
    summary = after.summary | dict.fromkeys(("spilled_bytes", "num_worker_restarts"))
    summary |= after.attempt("the cluster's metrics", cluster_facts) or {}
    if config.tracking.num_figure_images:
        after.attempt("figures", lambda: draw_figures(config, dataset, trainee, job.run_dir))
    summary |= _knn_results(config, dataset, trainee, after)  # last, because it takes the most memory
    names = {f"eval/{name}": summary[name] for name in ("knn_top1", "knn5shot_top1")}
    knn.finish({name: value for name, value in names.items() if value is not None})
    summary["problems"] = after.problems
    summary["mlflow_run_id"] = None
    if feed is not None:
        feed.finish(status="FINISHED", artifacts=final_artifacts(job.run_dir), values=final_values(summary))
        summary["mlflow_run_id"] = feed.run_id
        summary["mlflow_experiment_id"] = feed.experiment_id
    write_file(str(job.run_dir / "summary.json"), (json.dumps(summary, indent=1) + "\n").encode())
    after.finish()
    return summary


def _knn_results(
    config: RunConfig, dataset: Dataset, trainee: Trainee, after: AfterTraining
) -> dict[str, float | None]:
    """Evaluate the trained encoder, the untrained one and raw pixels; None: there are no labels, or it failed."""
    device, backbone = trainee.device, trainee.method.encoder
    suffixes = ("", "_untrained", "_pixels")
    results: dict[str, float | None] = dict.fromkeys(
        f"{kind}{suffix}" for kind in ("knn_top1", "knn5shot_top1") for suffix in suffixes
    )
    if not config.tracking.knn_images:
        return results
    knn_data = after.attempt("reading the images of the k-NN", lambda: load_knn_data(config, dataset))
    if knn_data is None:
        return results

    def untrained() -> dict[str, float]:
        encoder = build_untrained_method(config).encoder.to(device)
        return evaluate_encoder(encoder, knn_data, config, device)

    found = {
        "": after.attempt("k-NN of the trained encoder", lambda: evaluate_encoder(backbone, knn_data, config, device)),
        "_untrained": after.attempt("k-NN of the untrained encoder", untrained),
        "_pixels": after.attempt("k-NN of raw pixels", lambda: evaluate_pixels(knn_data, config)),
    }
    for suffix, result in found.items():
        if result is not None:
            results |= {f"knn_top1{suffix}": result["top1"], f"knn5shot_top1{suffix}": result["5shot"]}
    return results
