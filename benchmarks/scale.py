"""Measure CPU time and waiting of large pools on one machine: real Ray actors, tiny batches, timed work.

python benchmarks/scale.py [--parts stream start] [--workers N ...] [--batches N] [--json FILE]

stream: 8, 16, 32 and 64 workers, one trainer for every 8, as real actors with the product's stream. A worker waits instead
of rendering and returns a tiny batch (110 kB, so that it goes through the object store); a trainer waits instead of training.
The workers' capacity is 1.5 times what the trainers take. The trainers' steps become shorter and shorter, so that all of them
together take 10, 20, 40, ... batches a second, until they wait for more than 5 % of the time. Printed: CPU milliseconds of a
batch by process (workers, trainers, driver, raylet, GCS, rest), the wait, and the latency of `next_batch`.

The workers are no `ViewWorker`, which imports torch: 64 of them would take more memory than such a machine has.

start: the product's pool with 4, 8, 16 and 32 view workers: seconds until one is up, until all are, and memory of one.

CPU time counts all processes below this one. Nothing else should run.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import numpy as np
import psutil
import ray

from benchmarks.results_file import Results, describe_machine, open_results
from benchmarks.soak import small_config, write_images
from benchmarks.streams.cpu_time import read_cpu_times
from benchmarks.streams.timed_actors import TimedTrainer, TimedWorker
from hvp_ray.config import RunConfig, config_to_dict
from hvp_ray.records import ViewBatch

WORKERS_PER_TRAINER = 8
CAPACITY = 1.5
RATES = (10, 20, 40, 80, 160, 320, 640)
"""Batches a second of all trainers together."""
MOST_WAIT = 0.05
STORE_BYTES = 10**9


def scale_config(folder: Path) -> RunConfig:
    """Return the settings of all parts: batches of 110 kB."""
    config = small_config(folder, "scale", num_steps=10_000, checkpoint_every_steps=1000)
    data = dataclasses.replace(config.data, source=str(folder / "images"), test_fraction=0.0)
    cluster = dataclasses.replace(config.cluster, batches_in_flight=WORKERS_PER_TRAINER + 2, renderer="cpu")
    return dataclasses.replace(config, data=data, cluster=cluster)


def one_batch(config: RunConfig) -> ViewBatch:
    """Render the batch of the first step."""
    from benchmarks.streams.setting import requests_of
    from hvp_ray.stream.render_batch import open_render_context, render_batch

    context = open_render_context(config_to_dict(config), "cpu", None)
    return render_batch(context, requests_of(config)(0), worker="benchmark")


def measure_stream(config: RunConfig, num_workers: int, num_batches: int) -> Results:
    """Yield figures of a pool of this size at each rate that it keeps up with, and at the first one that it does not."""
    num_trainers = max(1, num_workers // WORKERS_PER_TRAINER)
    batch = ray.put(one_batch(config))
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "enable_task_events": False}
    started_at = time.perf_counter()
    workers = [ray.remote(**options)(TimedWorker).remote(batch) for _ in range(num_workers)]
    worker_ids = ray.get([worker.process_id.remote() for worker in workers])
    yield {"name": "scale.actors_up", "value": time.perf_counter() - started_at, "unit": "s", "workers": num_workers}
    trainers = [
        ray.remote(num_cpus=0)(TimedTrainer).remote(config_to_dict(config), workers, rank, num_trainers)
        for rank in range(num_trainers)
    ]
    trainer_ids = ray.get([trainer.process_id.remote() for trainer in trainers])
    ray.get([trainer.run.remote(4, 0.0) for trainer in trainers])  # imports, first connections
    for rate in RATES:
        step_seconds = num_trainers / rate
        ray.get([worker.take.remote(num_workers / rate / CAPACITY) for worker in workers])
        steps = max(20, num_batches // num_trainers)
        before, start = read_cpu_times(), time.perf_counter()
        waits = np.concatenate(
            [
                np.array(found[1:])
                for found in ray.get([trainer.run.remote(steps, step_seconds) for trainer in trainers])
            ]
        )
        seconds, after = time.perf_counter() - start, read_cpu_times()
        spent = cpu_by_kind(before, after, {"workers": worker_ids, "trainers": trainer_ids})
        wait = waits.mean() / (waits.mean() + step_seconds)
        context = {"workers": num_workers, "trainers": num_trainers, "batches_per_second": rate}
        yield {"name": "scale.wait", "value": float(wait), "unit": "fraction"} | context
        for percentile in (50, 99):
            value = float(np.percentile(waits, percentile))
            yield {"name": f"scale.next_batch_p{percentile}", "value": value, "unit": "s"} | context
        for kind, used in spent.items():
            per_batch = 1000 * used / (steps * num_trainers)
            yield {"name": f"scale.cpu.{kind}", "value": per_batch, "unit": "CPU ms per batch"} | context
        used = sum(spent.values()) / seconds
        yield {"name": "scale.cpu.cores", "value": used, "unit": "cores in use"} | context
        if wait > MOST_WAIT:
            break
    for actor in (*trainers, *workers):
        ray.kill(actor)


def cpu_by_kind(before: Any, after: Any, ids: dict[str, list[int]]) -> dict[str, float]:
    """Return CPU seconds between two moments by kind of process."""
    kind_of = {process_id: kind for kind, of_kind in ids.items() for process_id in of_kind}
    kind_of[psutil.Process().pid] = "driver"
    spent = dict.fromkeys(("workers", "trainers", "driver", "raylet", "gcs", "rest"), 0.0)
    for process_id, (name, seconds) in after.items():
        kind = kind_of.get(process_id) or {"raylet": "raylet", "gcs_server": "gcs"}.get(name, "rest")
        spent[kind] += seconds - before.get(process_id, (name, 0.0))[1]
    return spent


def measure_start(config: RunConfig, num_workers: int) -> Results:
    """Yield how long the product's pool takes to start, and the memory that a worker alone has."""
    from hvp_ray.stream.pool import start_pool

    started_at = time.perf_counter()
    pool = start_pool(config, "cpu", num_workers, {"CPU": 0.0})
    one_up = time.perf_counter() - started_at
    ids = ray.get([worker.process_id.remote() for worker in pool.workers.values()])
    all_up = time.perf_counter() - started_at
    own = [psutil.Process(process_id).memory_full_info().uss for process_id in ids]
    pool.close()
    context = {"workers": num_workers}
    yield {"name": "scale.start.first", "value": one_up, "unit": "s"} | context
    yield {"name": "scale.start.all", "value": all_up, "unit": "s"} | context
    yield {"name": "scale.start.memory", "value": float(np.mean(own)) / 1e6, "unit": "MB of a worker alone"} | context


def measure(parts: list[str], workers: list[int], num_batches: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of the parts."""
    with tempfile.TemporaryDirectory(prefix="hvp_ray-scale-") as name:
        folder = Path(name)
        write_images(folder / "images")
        config = scale_config(folder)
        ray.init(num_cpus=4, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
        try:
            for num_workers in workers if "stream" in parts else ():
                yield from measure_stream(config, num_workers, num_batches)
            for num_workers in (4, 8, 16, 32) if "start" in parts else ():
                yield from measure_start(config, num_workers)
        finally:
            ray.shutdown()


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--parts", nargs="+", choices=["stream", "start"], default=["stream", "start"])
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[8, 16, 32, 64], help="of part stream (default: %(default)s)"
    )
    parser.add_argument("--batches", type=int, default=400, help="of each measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with open_results(options.json, describe_machine("torch", "ray")) as keep:
        for result in measure(options.parts, options.workers, options.batches):
            context = ", ".join(
                f"{key} {value}" for key, value in result.items() if key not in ("name", "value", "unit")
            )
            print(f"{result['name']:28} {result['value']:10.4f} {result['unit']:24} {context}", flush=True)
            keep([result])


if __name__ == "__main__":
    main()
