"""(c) View workers, object store and trainer on one GPU, with real Ray: images per second, waiting, and who costs what.

Subjects, all with the product's own stream, loop and step: `headroom` (one batch, on the device already, again and again),
`inline` (rendered in the trainer's process), view workers with DALI on the trainer's GPU (1, 2), view workers on CPUs. With
one DALI worker also the timeline of the pinned ring, and the trainer's step with and without that worker rendering as fast
as it can. Then the product's own launch, with shares of the GPU.
"""

import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.gpu import timeline
from benchmarks.gpu.check import Check
from benchmarks.photographs import load_photographs
from benchmarks.results_file import Result, Results
from hvp_ray.config import RendererName, RunConfig, config_to_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.distributed.world import World
from hvp_ray.launch.environment import prepare_ray_environment
from hvp_ray.recipes import get_recipe
from hvp_ray.records import BatchRequest
from hvp_ray.runs.rank import build_order
from hvp_ray.stream.batches import BatchStream, InlineBatches, RequestOf, requests_of_rank
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import open_render_context, render_batch
from hvp_ray.stream.stats import StreamStats
from hvp_ray.training.loop import LoopResult, run_loop
from hvp_ray.training.step import StepMetrics
from hvp_ray.training.trainee import Trainee, build_trainee

_WARM_UP_STEPS = 5


def run(check: Check) -> Results:
    """Measure all subjects with one trainer."""
    prepare_ray_environment()
    import ray

    from hvp_ray.stream.spilling import spilled_bytes

    config = _config(check)
    trainee = build_trainee(config, World(), torch.device(check.device), None)
    request_of = _requests(config)
    cached = _cached_batch(config, check, request_of)
    headroom = _measure(trainee, _Again(cached), config, check.amount(40, 4))
    yield _rate("headroom", headroom, config)
    with _inline(config, check.renderer, request_of, check) as stream:
        yield from _subject("inline", trainee, stream, config, check.amount(20, 2), headroom, warm_up=1)
    ray.init(
        address="local",
        num_cpus=check.amount(16, 4),
        num_gpus=None if check.device == "cuda" else 1,
        object_store_memory=check.amount(8 * 2**30, 2**28),
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        subject = partial(_with_workers, check, config, trainee, request_of, headroom)
        with _pool(config, check.renderer, 1) as pool:
            yield from subject(pool, "dali-gpu.1-workers", check.amount(30, 4))
            with _stream(pool, config, request_of, 12, check) as batches:
                yield from timeline.draw(check, trainee, batches, config)
            yield from _neighbours("dali-gpu.1-workers", trainee, pool, cached, config, request_of, check)
        yield from _launch(config)
        workers = check.amount(14, 2)
        with _pool(config, "cpu", workers) as pool:
            yield from subject(pool, f"cpu.{workers}-workers", check.amount(15, 4))
        with _pool(config, check.renderer, 2) as pool:
            yield from subject(pool, "dali-gpu.2-workers", check.amount(30, 4))
        yield {"name": "end_to_end.spilled_bytes", "value": spilled_bytes(), "unit": "bytes"}
        with _inline(config, "cpu", request_of, check) as stream:
            yield from _subject("inline-cpu", trainee, stream, config, check.amount(3, 2), headroom, warm_up=1)
    finally:
        ray.shutdown()


def _with_workers(
    check: Check,
    config: RunConfig,
    trainee: Trainee,
    request_of: RequestOf,
    headroom: float,
    pool: Any,
    name: str,
    steps: int,
) -> Results:
    with _stream(pool, config, request_of, steps, check) as stream:
        yield from _subject(name, trainee, stream, config, steps, headroom)


def _config(check: Check) -> RunConfig:
    """SimSiam on ResNet-50 with 4 views of 224 px, 256 photographs a step."""
    config = get_recipe("simsiam-imagenet-r50-100ep")
    images = check.amount(256, 4)
    if check.rehearse:
        backbone = dataclasses.replace(config.method.backbone, name="resnet10t")
        small = dataclasses.replace(config.views.global_views, size_px=64)
        config = dataclasses.replace(
            config,
            method=dataclasses.replace(config.method, backbone=backbone),
            views=dataclasses.replace(config.views, global_views=small),
        )
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, output=str(check.folder / "runs"), name="end-to-end"),
        data=dataclasses.replace(
            config.data, source=str(_write_parquet(check, images)), test_fraction=0.0, shuffle_window_images=images
        ),
        training=dataclasses.replace(
            config.training,
            images_per_step=images,
            num_steps=check.amount(50, 4),
            checkpoint_every_steps=10_000,
            precision="float32" if check.rehearse else "bfloat16",
        ),
        cluster=dataclasses.replace(
            config.cluster, device=check.device, renderer=check.renderer, num_view_workers=2, batches_in_flight=6
        ),
        tracking=dataclasses.replace(
            config.tracking, uri="none", knn_images=0, num_figure_images=0, selection_images_per_epoch=0
        ),
    )


def _write_parquet(check: Check, images: int) -> Path:
    """Photographs in a file that has four steps of them."""
    path = check.folder / "photographs.parquet"
    encoded = load_photographs(check.data, check.amount(128, 4)).first(4 * images).images
    struct = pa.array(
        [{"bytes": image, "path": None} for image in encoded],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": struct}), path, row_group_size=images)
    return path


def _requests(config: RunConfig) -> RequestOf:
    order = build_order(config, open_dataset(config.data))
    return requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})


class _Observer:
    """Hears nothing and wants nothing."""

    def before_step(self, batch: DeviceBatch) -> None: ...
    def after_step(self, steps_done: int, batch: DeviceBatch, metrics: StepMetrics, learning_rate: float) -> None: ...
    def save_checkpoint(self, steps_done: int) -> None: ...
    def stop_requested(self) -> bool:
        return False


class _Again:
    """A stream of one batch."""

    def __init__(self, batch: DeviceBatch) -> None:
        self._batch = batch
        self.stats = StreamStats()

    def next_batch(self) -> DeviceBatch:
        return self._batch

    def close(self) -> None: ...


def _cached_batch(config: RunConfig, check: Check, request_of: RequestOf) -> DeviceBatch:
    context = open_render_context(config_to_dict(config), check.renderer)
    batch = CopyToDevice(torch.device(check.device))(render_batch(context, request_of(0)))
    batch.wait()
    return batch


@contextmanager
def _inline(config: RunConfig, renderer: RendererName, request_of: RequestOf, check: Check) -> Iterator[BatchStream]:
    """Yield batches that are rendered one ahead, as on a trainer's GPU."""
    context = open_render_context(config_to_dict(config), renderer)
    copy_to_device = CopyToDevice(torch.device(check.device))
    stream = InlineBatches(context, request_of, first_step=0, copy_to_device=copy_to_device, end_step=sys.maxsize)
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def _pool(config: RunConfig, renderer: RendererName, workers: int) -> Iterator[Any]:
    from hvp_ray.stream.pool import start_pool

    resources = {"CPU": 1.0} | ({"GPU": 0.1} if renderer == "dali-gpu" else {})
    pool = start_pool(config, renderer, workers, resources)
    import ray

    ray.get([worker.process_id.remote() for worker in pool.workers.values()])
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def _stream(pool: Any, config: RunConfig, request_of: RequestOf, steps: int, check: Check) -> Iterator[BatchStream]:
    from hvp_ray.stream.view_stream import ViewStream

    # Every worker has two batches in hand at least.
    cluster = dataclasses.replace(config.cluster, batches_in_flight=max(6, 2 * len(pool.workers)))
    copy_to_device = CopyToDevice(torch.device(check.device))
    stream = ViewStream(pool.workers, request_of, range(steps), cluster=cluster, copy_to_device=copy_to_device)
    try:
        yield stream
    finally:
        stream.close()


def _loop(trainee: Trainee, stream: BatchStream, config: RunConfig, steps: int) -> LoopResult:
    result = run_loop(trainee, stream, config, _Observer(), first_step=0, num_steps=steps, steps_per_epoch=1000)
    if trainee.device.type == "cuda":
        torch.cuda.synchronize()
    return result


def _measure(
    trainee: Trainee, stream: BatchStream, config: RunConfig, steps: int, warm_up: int = _WARM_UP_STEPS
) -> float:
    """Return images per second of the steps behind the first ones."""
    result = _loop(trainee, stream, config, steps)
    later = result.step_seconds[min(warm_up, steps - 1) :]
    return config.training.images_per_step * len(later) / sum(later)


def _subject(
    name: str,
    trainee: Trainee,
    stream: BatchStream,
    config: RunConfig,
    steps: int,
    headroom: float,
    warm_up: int = _WARM_UP_STEPS,
) -> Results:
    start = time.perf_counter()
    speed = _measure(trainee, stream, config, steps, warm_up)
    seconds, stats = time.perf_counter() - start, stream.stats
    yield _rate(name, speed, config)
    yield {"name": f"stream.{name}.share_of_headroom", "value": speed / headroom, "unit": "1"}
    waited = stats.wait_seconds / (seconds - stats.first_batch_seconds)
    yield {"name": f"stream.{name}.wait_fraction", "value": waited, "unit": "1"}
    yield {"name": f"stream.{name}.first_batch_seconds", "value": stats.first_batch_seconds, "unit": "s"}
    per_worker = stats.views_per_second_by_worker()
    if per_worker:
        value = statistics.mean(per_worker.values())
        yield {"name": f"stream.{name}.views_per_second_of_a_worker", "value": value, "unit": "views/s"}


def _rate(name: str, speed: float, config: RunConfig) -> Result:
    views = config.selection.num_candidate_views
    return {"name": f"stream.{name}.images_per_second", "value": speed, "unit": "images/s", "views_per_image": views}


def _neighbours(
    name: str,
    trainee: Trainee,
    pool: Any,
    cached: DeviceBatch,
    config: RunConfig,
    request_of: RequestOf,
    check: Check,
) -> Results:
    """The trainer's step on a batch at hand while the pool renders as fast as it can, and the pool's speed."""
    steps = check.amount(25, 3)
    alone = _measure(trainee, _Again(cached), config, steps)
    with _rendering(pool, request_of) as rendered:
        time.sleep(check.amount(2, 0))
        pool_alone = _views_per_second(rendered, lambda: time.sleep(check.amount(3, 1)), config)
        together: list[float] = []
        pool_beside = _views_per_second(
            rendered, lambda: together.append(_measure(trainee, _Again(cached), config, steps)), config
        )
    slower = alone / together[0] - 1.0
    yield {"name": f"sharing.{name}.trainer_alone", "value": alone, "unit": "images/s"}
    yield {"name": f"sharing.{name}.trainer_beside_rendering", "value": together[0], "unit": "images/s"}
    yield {"name": f"sharing.{name}.step_longer_by", "value": 100 * slower, "unit": "%"}
    yield {"name": f"sharing.{name}.rendering_alone", "value": pool_alone, "unit": "views/s"}
    yield {"name": f"sharing.{name}.rendering_beside_trainer", "value": pool_beside, "unit": "views/s"}


@contextmanager
def _rendering(pool: Any, request_of: Callable[[int], BatchRequest]) -> Iterator[list[float]]:
    """Keep every worker busy; yields the times at which batches ended, which grow."""
    import ray

    ends: list[float] = []
    stop = threading.Event()

    def work() -> None:
        under_way = {
            worker.render.remote(request_of(turn)): worker for turn in (0, 1) for worker in pool.workers.values()
        }
        turn = 2
        while not stop.is_set():
            done, _ = ray.wait(list(under_way), num_returns=1, timeout=1.0, fetch_local=False)
            for reference in done:
                worker = under_way.pop(reference)
                ends.append(time.perf_counter())
                under_way[worker.render.remote(request_of(turn))] = worker
                turn += 1
        ray.wait(list(under_way), num_returns=len(under_way), timeout=60.0)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield ends
    finally:
        stop.set()
        thread.join()


def _views_per_second(ends: list[float], during: Callable[[], object], config: RunConfig) -> float:
    before, start = len(ends), time.perf_counter()
    during()
    batches = len(ends) - before
    views = config.training.images_per_step * config.selection.num_candidate_views
    return batches * views / (time.perf_counter() - start)


def _launch(config: RunConfig) -> Results:
    """The product as `pretrain.py` starts it: Ray Train, shares of the GPU by Ray resources, a limit on torch's memory."""
    from hvp_ray.launch.driver import launch
    from hvp_ray.launch.watch import Watchers

    quiet = Watchers(announce=lambda _: None, show_progress=lambda _: None, show_message=lambda _: None)
    summary, _ = launch(config, quiet)
    for quantity, unit in (
        ("images_per_second", "images/s"),
        ("data_wait_fraction", "1"),
        ("spilled_bytes", "bytes"),
        ("peak_memory_bytes", "bytes"),
    ):
        yield {"name": f"launch.dali-gpu.{quantity}", "value": summary[quantity], "unit": unit}
