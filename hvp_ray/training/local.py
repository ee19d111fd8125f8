"""A run without Ray: in this process, or one of the processes that torchrun started. Views are rendered inline."""

import dataclasses
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hvp_ray.config import RunConfig, config_to_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.world import current_world, share_from_rank_0
from hvp_ray.errors import ConfigError
from hvp_ray.evaluation.online import SnapshotKnn
from hvp_ray.stream.batches import BatchStream, InlineBatches, RequestOf
from hvp_ray.stream.device import DeviceHandOver
from hvp_ray.stream.render_batch import open_render_context
from hvp_ray.training.intensity_check import check_intensities
from hvp_ray.training.online_knn import AnswerAtHand
from hvp_ray.training.preparation import draw_run_name, prepare_run
from hvp_ray.training.rank import train_rank


def pretrain_in_process(config: RunConfig) -> dict[str, Any] | None:
    """Train without Ray; return the summary on rank 0, None on the others.

    Under torchrun every process calls this; `cluster.num_trainers` must be the number of processes.

    Raises:
        ConfigError: the number of processes is another one, or the run cannot be prepared.
    """
    device_type = "cuda" if config.cluster.device == "cuda" else "cpu"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    world = current_world()
    if world.num_ranks != config.cluster.num_trainers:
        raise ConfigError(
            f"cluster.num_trainers={config.cluster.num_trainers}, but there are {world.num_ranks} processes; "
            f"without Ray start them with torchrun --nproc-per-node {config.cluster.num_trainers}"
        )
    torch.set_num_threads(config.training.torch_threads)
    device = (
        torch.device(device_type, int(os.environ.get("LOCAL_RANK", 0)))
        if device_type == "cuda"
        else torch.device("cpu")
    )
    if config.run.name is None and world.num_ranks > 1:
        name = share_from_rank_0(draw_run_name(config), device)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    check_intensities(config.data, open_dataset(config.data))
    renderer = "cpu" if config.cluster.renderer == "auto" else config.cluster.renderer
    job = prepare_run(config, renderer=renderer, device=device_type, is_writer=world.rank == 0)
    context = open_render_context(config_to_dict(config), renderer)
    hand_over = DeviceHandOver(device)
    evaluator = SnapshotKnn(config, device)

    def open_stream(request_of: RequestOf, first_step: int, _end_step: int) -> BatchStream:
        return InlineBatches(context, request_of, first_step=first_step, hand_over=hand_over)

    return train_rank(
        job,
        world,
        device,
        open_stream=open_stream,
        report_progress=lambda _progress: False,
        ask_knn=lambda snapshot: AnswerAtHand(evaluator.evaluate(snapshot)),
        cluster_facts=lambda: {"spilled_bytes": 0, "num_worker_restarts": 0},
    )
