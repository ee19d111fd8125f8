"""A run without Ray: in this process, or in the processes that torchrun started. Each renders its own views."""

import dataclasses
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hvp_ray.config import RendererName, RunConfig, config_to_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.world import World, current_world, share_from_rank_0
from hvp_ray.errors import ConfigError
from hvp_ray.evaluation.report import check_knn_labels
from hvp_ray.evaluation.snapshot import SnapshotKnn
from hvp_ray.identity import Identity
from hvp_ray.resolved_run import Device, resolve_inline
from hvp_ray.runs.channel_statistics import describe_channels
from hvp_ray.runs.check import describe_initial_weights
from hvp_ray.runs.intensity_check import check_intensities
from hvp_ray.runs.location import draw_run_name
from hvp_ray.runs.opened_rank import RankServices
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.progress import ReportProgress
from hvp_ray.runs.rank import train_rank
from hvp_ray.stream.batches import BatchStream, InlineBatches, RequestOf
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.render_batch import open_render_context

logger = logging.getLogger(__name__)


def pretrain_in_process(
    config: RunConfig,
    *,
    report_progress: ReportProgress = lambda _progress: False,
    is_stop_requested: Callable[[], bool] = lambda: False,
    planned: Identity | None = None,
    token: str | None = None,
) -> dict[str, Any] | None:
    """Train without Ray; return the summary on rank 0, and None on other ranks or after a stop.

    Under torchrun every process calls this. `cluster.num_trainers` must be the number of processes.

    Args:
        config: the run.
        report_progress: called on rank 0; returns whether the run shall stop after a checkpoint.
        is_stop_requested: called on rank 0 between the parts of the evaluation; returns whether the run shall stop.
        planned: see `prepare_run`, as for token.

    Raises:
        ConfigError: the number of processes differs from `cluster.num_trainers`, or the run cannot be prepared.
        DataError: the data cannot be used, or the labels of training and test images cannot be matched.
    """
    resolved = resolve_inline(config.cluster)
    world, device = _join_processes(resolved.device)
    if world.num_ranks != config.cluster.num_trainers:
        raise ConfigError(
            f"cluster.num_trainers={config.cluster.num_trainers}, but there are {world.num_ranks} processes; "
            f"without Ray start them with torchrun --nproc-per-node {config.cluster.num_trainers}"
        )
    torch.set_num_threads(config.training.torch_threads)
    if config.run.name is None and world.num_ranks > 1:
        name = share_from_rank_0(draw_run_name(config), device)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    dataset = open_dataset(config.data)
    if world.rank == 0:
        remarks = (
            *check_intensities(config.data, dataset),
            *describe_channels(config),
            *check_knn_labels(config, dataset),
            *describe_initial_weights(config),
        )
        for remark in remarks:
            logger.warning("%s", remark)
    job = prepare_run(config, resolved, is_writer=world.rank == 0, planned=planned, dataset=dataset, token=token)
    context = open_render_context(config_to_dict(config), resolved.renderer, job.data_fingerprint)
    copy_to_device = CopyToDevice(device)
    evaluator = SnapshotKnn(config, device, fingerprint=job.data_fingerprint, test_data=job.test_data)

    def open_stream(request_of: RequestOf, first_step: int, end_step: int) -> BatchStream:
        ahead = end_step if resolved.batches_in_flight else None
        return InlineBatches(context, request_of, first_step=first_step, copy_to_device=copy_to_device, end_step=ahead)

    def submit_knn(snapshot: bytes) -> Future[dict[str, float]]:
        answer: Future[dict[str, float]] = Future()
        answer.set_result(evaluator.evaluate(snapshot))
        return answer

    services = RankServices(
        open_stream=open_stream,
        report_progress=report_progress,
        is_stop_requested=is_stop_requested,
        submit_knn=submit_knn,
        cluster_facts=lambda: {"spilled_bytes": 0, "num_worker_restarts": 0},
    )
    with _ahead_of_rendering(device, resolved.renderer):
        return train_rank(job, world, device, services)


def _ahead_of_rendering(device: torch.device, renderer: RendererName) -> AbstractContextManager[object]:
    """Return a context whose work on a GPU has priority over DALI's streams, if DALI renders in this process."""
    if device.type != "cuda" or renderer != "dali-gpu":
        return nullcontext()
    torch.cuda.synchronize(device)  # what was begun on the default stream
    return torch.cuda.stream(torch.cuda.Stream(device, priority=-1))


def _join_processes(device_type: Device) -> tuple[World, torch.device]:
    """Take this process's device, and join the other processes of torchrun."""
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # otherwise every process also holds a context on the first GPU
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return current_world(), device
