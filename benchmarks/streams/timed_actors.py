"""A view worker and a trainer that wait instead of working. The worker imports little, so that many fit a machine."""

import dataclasses
import time
from typing import Any

import psutil

from hvp_ray.config import config_from_dict
from hvp_ray.records import BatchRequest, ViewBatch


class TimedWorker:
    """Answers like a view worker, with one batch again and again."""

    def __init__(self, batch: ViewBatch) -> None:
        self._batch = batch
        self._seconds = 0.0

    def process_id(self) -> int:
        """Return the id of this process."""
        return psutil.Process().pid

    def take(self, seconds: float) -> None:
        """Set the wait before each batch."""
        self._seconds = seconds

    def render(self, request: BatchRequest) -> ViewBatch:
        """Return the batch of a step."""
        time.sleep(self._seconds)
        return dataclasses.replace(self._batch, step=request.step)


class TimedTrainer:
    """Takes batches through the product's stream."""

    def __init__(self, values: dict[str, Any], workers: list[Any], rank: int, num_ranks: int) -> None:
        self._config, self._workers, self._ranks = config_from_dict(values), workers, (rank, num_ranks)

    def process_id(self) -> int:
        """Return the id of this process."""
        return psutil.Process().pid

    def run(self, steps: int, step_seconds: float) -> list[float]:
        """Return the wait before each step, s."""
        import torch

        from benchmarks.streams.setting import requests_of
        from benchmarks.streams.timed_loop import run_timed
        from hvp_ray.distributed.world import World
        from hvp_ray.stream.device import CopyToDevice
        from hvp_ray.stream.view_stream import ViewStream

        rank, num_ranks = self._ranks
        stream = ViewStream(
            dict(enumerate(self._workers)),
            requests_of(self._config),
            range(steps),
            cluster=self._config.cluster,
            copy_to_device=CopyToDevice(torch.device("cpu")),
            world=World(rank=rank, num_ranks=num_ranks),
        )
        try:
            times = run_timed(
                stream.next_batch, steps=steps, step_seconds=step_seconds, images_per_step=1, steps_per_epoch=steps
            )
        finally:
            stream.close()
        return list(times.waits)
