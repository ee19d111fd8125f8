"""Bringing batches that cost nothing to render from view workers to the trainer: GB/s, and CPU time for each byte.

The product's stream and actors, except that a worker renders its first batch only and returns it again and again: what is
left is Ray's copy into the object store, the raylets, between nodes the network, and the stream's `get`.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from benchmarks.streams.cpu_time import CpuSpent, cpu_spent, read_cpu_times
from benchmarks.streams.setting import Setting, requests_of
from benchmarks.streams.touched_store import touch_store
from benchmarks.streams.training import CPU
from hvp_ray.config import config_to_dict
from hvp_ray.records import BatchRequest, ViewBatch
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.view_stream import ViewStream
from hvp_ray.stream.view_worker import ViewWorker


class CachedWorker(ViewWorker):
    """A view worker that renders once."""

    _batch: ViewBatch | None = None

    def render(self, request: BatchRequest) -> ViewBatch:
        if self._batch is None:
            self._batch = super().render(request)
        return dataclasses.replace(self._batch, step=request.step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Transport:
    """What it took to bring some batches."""

    num_bytes: int
    seconds: float
    cpu: CpuSpent | None
    """None: the processes are not below this one."""
    copy_cpu_seconds: float
    """CPU time of copying one batch out of the store into memory at hand, as it is done into pinned memory for a GPU."""

    @property
    def gigabytes_per_second(self) -> float:
        return self.num_bytes / self.seconds / 1e9


def measure_transport(setting: Setting, num_workers: int, steps: int, resources: dict[str, float]) -> Transport:
    """Bring `steps` batches as fast as it goes, with the store's memory touched by the workers and as many batches before.

    Args:
        setting: says what a batch is.
        num_workers: view workers.
        steps: batches.
        resources: Ray resources, besides a CPU, that tell where the workers are.
    """
    actor: Any = ray.remote(max_restarts=-1, max_task_retries=0)(CachedWorker)
    values = config_to_dict(setting.config)
    options = {"num_cpus": 1.0, "resources": resources}
    workers = [actor.options(**options).remote(values, "cpu", f"cached-{i}") for i in range(num_workers)]
    process_ids = ray.get([worker.process_id.remote() for worker in workers])
    with _stream(workers, setting, steps) as stream:
        for _ in range(steps):
            stream.next_batch()
    ray.get([worker.__ray_call__.remote(touch_store) for worker in workers])
    before, start = read_cpu_times(), time.perf_counter()
    with _stream(workers, setting, steps) as stream:
        for _ in range(steps):
            batch = stream.next_batch()
        seconds, after = time.perf_counter() - start, read_cpu_times()
        pixels = batch.global_views.pixels
        copy_cpu_seconds = _copy_cpu_seconds(pixels)
    for worker in workers:
        ray.kill(worker)
    spent = cpu_spent(before, after, workers=process_ids) if set(process_ids) <= set(after) else None
    num_bytes = steps * setting.batch_bytes
    return Transport(num_bytes=num_bytes, seconds=seconds, cpu=spent, copy_cpu_seconds=copy_cpu_seconds)


def _copy_cpu_seconds(pixels: Any) -> float:
    staging = np.zeros_like(pixels)
    np.copyto(staging, pixels)
    start = time.thread_time()
    for _ in range(5):
        np.copyto(staging, pixels)
    return (time.thread_time() - start) / 5


@contextmanager
def _stream(workers: list[Any], setting: Setting, steps: int) -> Iterator[ViewStream]:
    stream = ViewStream(
        dict(enumerate(workers)),
        requests_of(setting.config),
        range(steps),
        cluster=setting.config.cluster,
        copy_to_device=CopyToDevice(CPU),
    )
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def two_nodes(store_bytes: int) -> Iterator[str]:
    """Join the cluster that RAY_ADDRESS names, some other node of which has the resource `view`; or make one.

    That one is two raylets on this machine, the trainer's and one for all view workers, each with a store of its own.
    Yields in words what the path is.
    """
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        try:
            yield "nodes of a cluster"
        finally:
            ray.shutdown()
        return
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": store_bytes})
    try:
        cluster.add_node(num_cpus=4, resources={"view": 4}, object_store_memory=store_bytes)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield "two raylets on one machine"
    finally:
        ray.shutdown()
        cluster.shutdown()
