"""Test the stream with real actors: order, bounds, retries, quarantine, waiting, spilling."""

import dataclasses
import os
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from hvp_ray.config import ClusterConfig, RunConfig, config_to_dict
from hvp_ray.costs.prefetch import batch_bytes
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import ConfigError, DataError, HvpRayError, StageError
from hvp_ray.launch.placement import decide_batches_in_flight
from hvp_ray.records import BatchRequest, ViewBatch
from hvp_ray.runs.rank import build_order
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.pool import num_restarts, start_pool
from hvp_ray.stream.render_batch import open_render_context, render_batch
from hvp_ray.stream.spilling import spilled_bytes
from hvp_ray.stream.view_stream import ViewStream
from hvp_ray.stream.view_worker import ViewFinisher, ViewWorker, start_finishers
from tests.helpers import encode, photograph_like, tiny_config
from tests.ray.runs import processes_titled
from tests.ray.workers import PoisonedWorker, SlowFinisher, SlowWorker
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("ray_session")

CONFIG = tiny_config("unused", run={"output": None})
CPU = torch.device("cpu")
NEVER_SECONDS = 1e6
"""A worker this slow never answers: the stream ends with an error if it waits for it."""


def _start(actor_class: type[ViewWorker | ViewFinisher], count: int, *arguments: object) -> list[Any]:
    remote = ray.remote(max_restarts=-1, max_task_retries=0)(actor_class)
    values = config_to_dict(CONFIG)
    return [remote.options(num_cpus=0.5).remote(values, f"worker-{i}", *arguments) for i in range(count)]


@pytest.fixture(scope="module")
def shared_workers(ray_session: None) -> Iterator[list[Any]]:
    """Start three view workers for the tests that leave them alive and idle."""
    workers = _start(SlowWorker, 3, 0.0)
    yield workers
    _kill(workers)


def _requests(config: Any = CONFIG) -> Any:
    order = build_order(config, open_dataset(config.data))
    return requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={})


def _stream(
    workers: list[Any] | dict[int, Any],
    *,
    end_step: int,
    request_of: Any = None,
    finishers: Sequence[Any] = (),
    copy_to_device: CopyToDevice | None = None,
    **cluster: Any,
) -> ViewStream:
    settings = dataclasses.replace(ClusterConfig(batches_in_flight=3), **cluster)
    return ViewStream(
        dict(enumerate(workers)) if isinstance(workers, list) else workers,
        request_of or _requests(),
        range(end_step),
        cluster=settings,
        copy_to_device=copy_to_device or CopyToDevice(CPU),
        finishers=finishers,
    )


def _config_of_folder(tmp_path: Path) -> RunConfig:
    """Write images into the folder `images`; return a run on them."""
    generator = np.random.default_rng(0)
    for index in range(40):
        folder = tmp_path / "images" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(encode(photograph_like(generator, 20, 20)))
    return tiny_config(str(tmp_path), data={"source": str(tmp_path / "images"), "num_images": None})


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        ray.kill(worker, no_restart=True)


def test_batches_come_in_order_and_equal_inline_rendering(shared_workers: list[Any]) -> None:
    stream = _stream(shared_workers, end_step=12)
    context = open_render_context(config_to_dict(CONFIG), "cpu")
    for step in range(12):
        batch = stream.next_batch()
        expected = render_batch(context, _requests()(step))
        assert batch.step == step
        assert np.array_equal(batch.global_pixels.numpy(), expected.global_views.pixels)
        assert np.array_equal(batch.sample_ids, expected.sample_ids)
    with pytest.raises(StopIteration):
        stream.next_batch()
    assert stream.stats.num_batches == 12
    assert stream.stats.views == 12 * 4 * 16
    assert stream.stats.num_bytes == 12 * batch_bytes(CONFIG)
    assert set(stream.stats.views_per_second_by_worker()) == {"worker-0", "worker-1", "worker-2"}
    stream.close()


def test_batches_of_killed_finishers_are_rendered_by_others(shared_workers: list[Any]) -> None:
    """Workers decode and finishers render: batches and their order stay equal when finishers die."""
    config = tiny_config("unused", run={"output": None}, cluster={"ship": "pixels", "finishers_per_trainer": 2})
    finishers = start_finishers(config, rank=0)
    assert len(finishers) == 2
    ray.get([finisher.process_id.remote() for finisher in finishers])
    stream = _stream(shared_workers, end_step=12, finishers=finishers)
    context = open_render_context(config_to_dict(CONFIG), "cpu")
    for step in range(12):
        if step in (3, 7):
            for process in processes_titled("ray::ViewFinisher"):
                os.kill(process.pid, signal.SIGKILL)
        batch = stream.next_batch()
        expected = render_batch(context, _requests()(step))
        assert batch.step == step
        assert np.array_equal(batch.global_pixels.numpy(), expected.global_views.pixels)
        assert batch.decoded_bytes > 0
    assert stream.stats.num_worker_deaths >= 1
    assert stream.stats.num_isolations == 0
    assert set(stream.stats.views_per_second_by_worker()) == {"worker-0", "worker-1", "worker-2"}
    stream.close()
    _kill(finishers)


def test_late_finisher_is_overtaken_by_another(shared_workers: list[Any]) -> None:
    fast, stuck = _start(SlowFinisher, 1, 0.02)[0], _start(SlowFinisher, 1, NEVER_SECONDS)[0]
    ray.get([actor.process_id.remote() for actor in (fast, stuck)])
    stream = _stream(shared_workers, end_step=4, finishers=[fast, stuck], late_seconds=0.5, late_factor=2.0)
    assert [stream.next_batch().step for _ in range(4)] == [0, 1, 2, 3]
    assert stream.stats.num_retries >= 1
    stream.close()
    _kill([fast, stuck])


class _CountingCopy(CopyToDevice):
    """Counts the batches on the device."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._pixels: list[weakref.ref[torch.Tensor]] = []
        self.most_alive = 0

    def __call__(self, batch: ViewBatch) -> DeviceBatch:
        moved = super().__call__(batch)
        self._pixels.append(weakref.ref(moved.global_pixels))
        self.most_alive = max(self.most_alive, sum(pixels() is not None for pixels in self._pixels))
        return moved


def test_batches_in_flight_are_bounded_and_two_are_on_the_device(
    shared_workers: list[Any],
) -> None:
    requested: list[int] = []
    requests = _requests()

    def request_of(step: int) -> BatchRequest:
        requested.append(step)
        return requests(step)

    copy_to_device = _CountingCopy()
    stream = _stream(
        shared_workers[:1], end_step=20, request_of=request_of, batches_in_flight=5, copy_to_device=copy_to_device
    )
    for step in range(10):
        batch = stream.next_batch()
        wait_until(lambda: stream.numbers()["hvp_ray_ready_batches"] == 5.0, "all requested batches")
        assert batch.step == step
        assert requested == list(range(step + 6))
        del batch
    assert copy_to_device.most_alive == 2
    stream.close()


def test_data_wait_is_measured_within_ten_percent_of_the_time_outside_steps(shared_workers: list[Any]) -> None:
    """A worker of 0.25 s a batch and a trainer of 0.1 s a step: each step waits for about 0.15 s."""
    worker = shared_workers[0]
    ray.get(worker.set_seconds.remote(0.25))
    stream = _stream([worker], end_step=25)
    stream.next_batch()
    step_seconds = 0.0
    started = time.perf_counter()
    for _ in range(24):
        step_started = time.perf_counter()
        time.sleep(0.1)
        step_seconds += time.perf_counter() - step_started
        stream.next_batch()
    elapsed = time.perf_counter() - started
    assert stream.stats.wait_seconds == pytest.approx(elapsed - step_seconds, rel=0.1)
    assert elapsed > (24 - 3) * 0.25  # the worker sets the pace, after at most three batches in flight at the start
    stream.close()
    ray.get(worker.set_seconds.remote(0.0))


def test_late_workers_are_overtaken_by_another(shared_workers: list[Any]) -> None:
    """A step that is late at one stuck worker is requested from the other one, which is idle, and then from the fast one."""
    stuck = _start(SlowWorker, 2, NEVER_SECONDS)
    ray.get([worker.process_id.remote() for worker in stuck])
    workers = [shared_workers[0], *stuck]
    stream = _stream(workers, end_step=4, batches_in_flight=1, late_seconds=0.5, late_factor=2.0)
    assert [stream.next_batch().step for _ in range(4)] == [0, 1, 2, 3]
    assert stream.stats.num_retries >= 2
    stream.close()
    _kill(stuck)


@pytest.mark.parametrize("num_finishers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_only_the_image_that_kills_workers_is_quarantined_and_replaced(num_finishers: int) -> None:
    """With a finisher the error that the trainer sees is the finisher's; still the worker is down, and not the finisher."""
    poison_id = int(_requests()(1).sample_ids[5])
    workers, finishers = _start(PoisonedWorker, 2, poison_id), _start(ViewFinisher, num_finishers)
    ray.get([actor.process_id.remote() for actor in (*workers, *finishers)])
    pids = [ray.get(finisher.process_id.remote()) for finisher in finishers]
    stream = _stream(workers, end_step=4, finishers=finishers)
    batches = [stream.next_batch() for _ in range(4)]
    assert stream.stats.num_isolations >= 1
    assert stream.stats.num_worker_deaths >= 3
    context = open_render_context(config_to_dict(CONFIG), "cpu")
    for step, batch in enumerate(batches):
        expected = render_batch(context, _requests()(step))
        same = batch.sample_ids == expected.sample_ids
        assert same.tolist() == [i != poison_id for i in expected.sample_ids.tolist()]
        healthy = np.flatnonzero(same)
        assert np.array_equal(batch.global_views.pixels[:, healthy], expected.global_views.pixels[:, healthy])
    assert [r.unreadable_id for r in batches[1].replacements] == [poison_id]
    assert [ray.get(finisher.process_id.remote()) for finisher in finishers] == pids
    stream.close()
    _kill([*workers, *finishers])


@pytest.mark.long
def test_random_kills_of_workers_quarantine_no_image() -> None:
    pool = start_pool(CONFIG, "cpu", 2, {"CPU": 1.0})
    stream = _stream(pool.workers, end_step=12)
    for step in range(12):
        if step in (2, 5, 8):
            for process in processes_titled("ray::ViewWorker"):
                os.kill(process.pid, signal.SIGKILL)
        batch = stream.next_batch()
        assert batch.step == step
        assert not batch.replacements
    assert stream.stats.num_retries >= 1
    assert num_restarts(pool.actor_ids()) >= 2
    stream.close()
    pool.close()


def test_stall_is_an_error_with_the_numbers() -> None:
    workers = _start(SlowWorker, 1, NEVER_SECONDS)
    ray.get(workers[0].process_id.remote())
    stream = _stream(workers, end_step=2, stall_seconds=1.5)
    with pytest.raises(StageError, match=r"step 0.*stall_seconds.*1 of 1 view workers are up, 2 calls in flight"):
        stream.next_batch()
    stream.close()
    _kill(workers)


def test_storage_error_reaches_the_trainer_and_is_not_retried_by_the_stream(tmp_path: Path) -> None:
    config = _config_of_folder(tmp_path)
    pool = start_pool(config, "cpu", 1, {"CPU": 1.0})
    requests = _requests(config)
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
    stream = _stream(pool.workers, end_step=2, request_of=requests)
    with pytest.raises(DataError, match=r"reading 16 images.*failed 4 times.*No such file"):
        stream.next_batch()
    stream.close()
    pool.close()


def test_workers_that_cannot_open_the_data_are_an_error_with_the_reason() -> None:
    config = tiny_config("unused", data={"source": "/nowhere/images"})
    with pytest.raises(HvpRayError, match="no view worker could start.*/nowhere/images.*does not exist"):
        start_pool(config, "cpu", 2, {"CPU": 1.0})


@pytest.mark.long
def test_worker_that_fails_to_restart_is_restarted_until_it_succeeds(tmp_path: Path) -> None:
    """The images are missing while Ray restarts the worker."""
    config = _config_of_folder(tmp_path)
    pool = start_pool(config, "cpu", 1, {"CPU": 1.0})
    stream = _stream(pool.workers, end_step=8, request_of=_requests(config))
    assert stream.next_batch().step == 0
    (tmp_path / "images").rename(tmp_path / "away")
    for process in processes_titled("ray::ViewWorker"):
        process.kill()
    wait_until(lambda: num_restarts(pool.actor_ids()) >= 2, "a restart that fails")
    (tmp_path / "away").rename(tmp_path / "images")
    assert [stream.next_batch().step for _ in range(7)] == list(range(1, 8))
    stream.close()
    pool.close()


def test_prefetch_that_would_spill_is_refused_with_a_number_that_fits() -> None:
    config = tiny_config("unused", training={"images_per_step": 180}, cluster={"batches_in_flight": 100})
    per_step = batch_bytes(config)
    assert per_step == 4 * 180 * 8 * 8 * 3
    store = ray.cluster_resources()["object_store_memory"]
    assert decide_batches_in_flight(config.cluster, 1, store, per_step) == 100
    with pytest.raises(ConfigError, match=r"cluster.batches_in_flight=34.*object_store_mib"):
        decide_batches_in_flight(config.cluster, 1, 50.0 * per_step, per_step)


def test_spilled_bytes_are_measured() -> None:
    """The session's store holds 400 MiB, so at least 160 MiB of 640 MiB are written to disk."""
    before = spilled_bytes()
    references = [ray.put(np.full(64 * 2**20, index, np.uint8)) for index in range(10)]
    wait_until(lambda: spilled_bytes() - before >= 160 * 2**20, "spilling", pause=0.2)
    assert int(ray.get(references[0])[0]) == 0
