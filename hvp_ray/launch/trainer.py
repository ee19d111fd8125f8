"""One trainer: the function that each worker of Ray Train runs."""

import dataclasses
import logging
from typing import Any

import cv2
import ray
import ray.train.torch
import torch

from hvp_ray.distributed.world import World, current_world
from hvp_ray.errors import HvpRayError, LostRunError
from hvp_ray.launch.board import BoardLogHandler, ProgressPoster, RosterPoster
from hvp_ray.launch.trainer_setup import TrainerSetup
from hvp_ray.logs import set_up_logging
from hvp_ray.resolved_run import ResolvedRun
from hvp_ray.runs.opened_rank import RankServices
from hvp_ray.runs.rank import train_rank
from hvp_ray.stream.batches import BatchStream, RequestOf
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.metrics import MetricsPublisher
from hvp_ray.stream.view_stream import ViewStream
from hvp_ray.stream.view_worker import start_finishers
from hvp_ray.tracking.metrics_table import TRAINER_METRICS

logger = logging.getLogger(__name__)

_CLUSTER_METRICS_SECONDS = 10.0


def trainer_main(setup: TrainerSetup) -> None:
    """Run one trainer to the end, and post its summary or its error."""
    world, board, run_name = current_world(), setup.board, setup.job.run_name
    set_up_logging(run=run_name, origin=f"rank={world.rank}")
    handler = BoardLogHandler(board, prefix="" if world.num_ranks == 1 else f"trainer {world.rank}: ")
    logging.getLogger("hvp_ray").addHandler(handler)
    try:
        if ray.get(board.read.remote()).fatal is not None:
            return  # another rank met an error that a restart does not fix
        summary = _train(setup, world)
    except HvpRayError as error:
        if isinstance(error, LostRunError) and error.same_job:
            raise  # the driver goes on with the later attempt
        # A restart would fail in the same way, so the driver ends the run.
        error.add_note(f"rank {world.rank} of {world.num_ranks}, run {run_name}")
        ray.get(board.post_fatal.remote("\n".join([str(error), *error.__notes__])))
        if world.num_ranks == 1:
            return
        raise  # frees the other ranks, which wait in a collective
    finally:
        logging.getLogger("hvp_ray").removeHandler(handler)
        handler.close()
    if summary is not None:
        ray.get(board.post.remote(summary=summary))


def _train(setup: TrainerSetup, world: World) -> dict[str, Any] | None:
    """Train this rank; return the summary on rank 0 of a finished run."""
    # Before the run is opened: a run whose pool does not start stays as it was.
    if not setup.wait_for_workers():
        return None
    job, board = setup.job, setup.board
    cluster = job.config.cluster
    torch.set_num_threads(job.config.training.torch_threads)
    cv2.setNumThreads(1)
    device = _take_device(job.resolved)
    publisher = MetricsPublisher(TRAINER_METRICS, {"run": job.run_name, "rank": str(world.rank)})
    copy_to_device = CopyToDevice(device)
    finishers = start_finishers(job.config, rank=world.rank)

    def open_stream(request_of: RequestOf, first_step: int, end_step: int) -> BatchStream:
        roster = setup.roster()
        logger.info("steps %d to %d, views from %d workers", first_step, end_step, len(roster.workers))
        stream = ViewStream(
            roster.workers,
            request_of,
            range(first_step, end_step),
            cluster=dataclasses.replace(cluster, batches_in_flight=roster.batches_in_flight),
            copy_to_device=copy_to_device,
            world=world,
            finishers=finishers,
            exchange=RosterPoster(board),
        )
        publisher.watch(stream.numbers)
        return stream

    try:
        if world.rank == 0:
            publisher.watch(setup.cluster_metrics, every_seconds=_CLUSTER_METRICS_SECONDS)
        services = RankServices(
            open_stream=open_stream,
            report_progress=ProgressPoster(board),
            submit_knn=lambda snapshot: setup.knn.evaluate.remote(snapshot).future(),
            cluster_facts=setup.cluster_facts,
            watch_metrics=publisher.watch,
            is_stop_requested=lambda: bool(ray.get(board.post.remote(is_trained=True))),
        )
        return train_rank(job, world, device, services)
    finally:
        publisher.close()


def _take_device(resolved: ResolvedRun) -> torch.device:
    """Return this trainer's device. On a shared GPU, limit the memory to the trainer's share."""
    if resolved.device == "cpu":
        return torch.device("cpu")
    device: torch.device = ray.train.torch.get_device()
    share = resolved.trainer_resources["GPU"]
    if share < 1.0:
        torch.cuda.set_per_process_memory_fraction(share, device)
    return device
