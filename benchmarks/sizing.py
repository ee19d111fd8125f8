"""Is the pool as fast as docs/sizing.md says? Images per second of real pools beside the formula; large pools on paper.

python benchmarks/sizing.py [--data PARQUET] [--images-per-step N] [--steps N] [--only measured paper] [--json FILE]

measured: service times of this machine (CPU ms an image, one thread: `costs/service_times.py`), then pools of
one and of two view workers, and of one view worker with one view finisher that ship decoded pixels, each emptied by a trainer
that does nothing else. Predicted is what the slowest stage can do. Busy: CPU time of the processes that render, as a share
of the wall time and of their number; below 1 the machine was short of cores, so beside the ratio stands that for the time in
which they ran. MiB: memory that the largest of them has for itself. The first batches are not counted.

paper: waiting of 64 trainers for 256 view workers, and of one trainer for 1 to 16, by `pool_simulation.py`: rendering times
vary by 10 %, whom a trainer asks is decided by the product's own code. Then a pool for 64 trainers that sizes itself, while
batches become twice as dear and cheap again: workers, and waiting in each part of the run.
"""

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)  # this checkout, wherever it is started from
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])  # Ray's processes too

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import psutil  # type: ignore[import-untyped]
import ray
import torch

from benchmarks.photographs import load_photographs
from benchmarks.pool_simulation import Pool, Sizing, simulate, simulate_sizing
from benchmarks.results_file import Result, describe_machine, open_results
from hvp_ray.config import RunConfig
from hvp_ray.costs.prefetch import batches_for_workers
from hvp_ray.costs.service_times import ServiceTimes, measure_service_times
from hvp_ray.data.dataset import open_dataset
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.rank import build_order
from hvp_ray.stream.batches import requests_of_rank
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.pool import start_pool
from hvp_ray.stream.reading import read_sample
from hvp_ray.stream.view_stream import ViewStream
from hvp_ray.stream.view_worker import start_finishers

POOLS = ((1, 0), (2, 0), (1, 1))
"""View workers, view finishers."""


def configure(data: str, images_per_step: int, *, finishers: int) -> RunConfig:
    """Return a run of SimSiam on photographs that never ends."""
    config = get_recipe("simsiam-imagenet-r50-100ep")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=data),
        training=dataclasses.replace(config.training, images_per_step=images_per_step, epochs=10_000),
        cluster=dataclasses.replace(config.cluster, ship="pixels" if finishers else "views", finishers_per_trainer=1),
    )


def predict(times: ServiceTimes, workers: int, finishers: int) -> float:
    """Return images per second of the slowest stage."""
    if not finishers:
        return workers / times.whole_seconds
    return min(workers / times.decode_seconds, finishers / times.finish_seconds)


def bottleneck_processes(times: ServiceTimes, workers: int, finishers: int) -> float:
    """Return how many processes work at the predicted speed: with two stages one of them waits for the other."""
    if not finishers:
        return float(workers)
    return predict(times, workers, finishers) * (times.decode_seconds + times.finish_seconds)


def measure_pool(config: RunConfig, workers: int, steps: int) -> tuple[float, float, float]:
    """Return images per second, CPU seconds of the rendering processes / wall seconds, and the largest one's own bytes."""
    dataset = open_dataset(config.data)
    order = build_order(config, dataset)
    pool = start_pool(config, "cpu", workers, {"CPU": 1.0})
    beside = start_finishers(config, rank=0)
    process_ids = ray.get([actor.process_id.remote() for actor in [*pool.workers.values(), *beside]])
    batches_in_flight = batches_for_workers(config.cluster, workers)
    warm_up = batches_in_flight + 2
    stream = ViewStream(
        pool.workers,
        requests_of_rank(config, order, rank=0, num_ranks=1, known_replacements={}),
        range(warm_up + steps),
        cluster=dataclasses.replace(config.cluster, batches_in_flight=batches_in_flight),
        copy_to_device=CopyToDevice(torch.device("cpu")),
        finishers=beside,
    )
    try:
        for _ in range(warm_up):
            stream.next_batch()
        begun, cpu_begun = time.perf_counter(), _cpu_seconds(process_ids)
        for _ in range(steps):
            stream.next_batch()
        seconds, cpu = time.perf_counter() - begun, _cpu_seconds(process_ids) - cpu_begun
        own_bytes = max(psutil.Process(process_id).memory_full_info().uss for process_id in process_ids)
    finally:
        stream.close()
        for actor in beside:
            ray.kill(actor)
        pool.close()
    return steps * config.training.images_per_step / seconds, cpu / seconds, own_bytes


def _cpu_seconds(process_ids: list[int]) -> float:
    return sum(sum(psutil.Process(process_id).cpu_times()[:2]) for process_id in process_ids)


def measured(data: str, images_per_step: int, steps: int) -> Iterator[Result]:
    """Measure the pools beside the formula."""
    config = configure(data, images_per_step, finishers=0)
    dataset = open_dataset(config.data)
    times = measure_service_times(config, list(read_sample(dataset.source, dataset.training_ids)), seconds=3.0)
    print(
        f"\nan image: {times.whole_seconds * 1e3:.2f} CPU ms whole; {times.decode_seconds * 1e3:.2f} decoded, "
        f"{times.finish_seconds * 1e3:.2f} rendered from that; kB: {times.encoded_bytes / 1e3:.0f} encoded, "
        f"{times.shipped_pixel_bytes / 1e3:.0f} of pixels, {times.view_bytes / 1e3:.0f} of views"
    )
    for field in ("whole_seconds", "decode_seconds", "finish_seconds", "shipped_pixel_bytes", "view_bytes"):
        unit = "bytes" if field.endswith("bytes") else "s"
        yield {"name": f"sizing.{field}", "value": getattr(times, field), "unit": unit}
    titles = ("view workers", "finishers", "images/s", "predicted", "ratio", "busy", "ratio, busy", "MiB each")
    print("\n" + "".join(f"{title:>13}" for title in titles))
    store = 3 * 10 * 2 * int(times.view_bytes) * images_per_step
    # As many CPUs as the pools ask for: what they really share is this machine.
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=store)
    for workers, finishers in POOLS:
        pool_config = configure(data, images_per_step, finishers=finishers)
        rate, busy, own_bytes = measure_pool(pool_config, workers, steps)
        expected = predict(times, workers, finishers)
        share = busy / bottleneck_processes(times, workers, finishers)
        ratio = rate / expected
        print(
            f"{workers:>13}{finishers:>13}{rate:>13.0f}{expected:>13.0f}{ratio:>13.2f}{share:>13.2f}{ratio / share:>13.2f}"
            f"{own_bytes / 2**20:>13.0f}",
            flush=True,
        )
        name, busy_context = f"sizing.workers-{workers}.finishers-{finishers}", {"busy": round(share, 3)}
        yield {"name": f"{name}.images_per_second", "value": rate, "unit": "images/s"}
        yield {"name": f"{name}.ratio_to_formula", "value": ratio, "unit": "1"} | busy_context
        yield {"name": f"{name}.own_bytes", "value": own_bytes, "unit": "bytes"}
    ray.shutdown()


def paper() -> Iterator[Result]:
    """Simulate pools that are too large for this machine."""

    def table(
        title: str, key: str, rows: list[tuple[str, list[Pool]]], columns: list[Any], steps: int
    ) -> Iterator[Result]:
        print(f"\n{title}\n{'':<34}" + "".join(f"{column:>8}" for column in columns))
        for label, pools in rows:
            waits = [simulate(pool, num_steps=steps) for pool in pools]
            print(f"{label:<34}" + "".join(f"{100 * wait:>7.1f}%" for wait in waits), flush=True)
            for pool, wait in zip(pools, waits, strict=True):
                yield {"name": f"sizing.paper.{key}.wait_fraction", "value": wait, "unit": "1"} | dataclasses.asdict(
                    pool
                )

    ahead = [4, 5, 6, 8]
    base = Pool(num_workers=256, num_trainers=64, batches_in_flight=6, capacity=1.2)
    rows = [
        (
            f"capacity {capacity}" + ("" if spread else ", trainer r begins with worker r"),
            [dataclasses.replace(base, capacity=capacity, batches_in_flight=n, starts_spread=spread) for n in ahead],
        )
        for spread, capacity in ((True, 1.0), (True, 1.1), (True, 1.2), (False, 1.2))
    ]
    yield from table(
        "waiting of 64 trainers for 256 view workers; columns: batches in flight", "large", rows, ahead, 300
    )
    ahead = [2, 4, 6, 10, 18]
    one = Pool(num_workers=1, num_trainers=1, batches_in_flight=4, capacity=1.2)
    rows = [
        (f"{workers} view workers", [dataclasses.replace(one, num_workers=workers, batches_in_flight=n) for n in ahead])
        for workers in (1, 2, 4, 8, 16)
    ]
    yield from table("waiting of one trainer, capacity 1.2; columns: batches in flight", "one", rows, ahead, 2000)
    yield from sizing_on_paper()


def sizing_on_paper() -> Iterator[Result]:
    """Simulate a pool that sizes itself: a demand of 102 workers, of 205 from 300 to 700 s, and of 102 again."""
    sizing = Sizing(num_trainers=64, num_workers=64, render_seconds=lambda now: 3.2 if 300.0 <= now < 700.0 else 1.6)
    history = simulate_sizing(sizing, seconds=1200.0)
    print("\n64 trainers, a pool that sizes itself\n     from      to  demand  view workers  waiting")
    edges = (0.0, 100.0, 300.0, 400.0, 500.0, 700.0, 900.0, 1200.0)
    for begin, end in itertools.pairwise(edges):
        wait, size = history.wait_fraction(begin, end), history.sizes_within(begin, end)[-1]
        print(f"{begin:>7.0f} s{end:>6.0f} s{sizing.demand(begin):>8.0f}{size:>14}{100 * wait:>8.1f}%")
        yield {
            "name": "sizing.paper.self.wait_fraction",
            "value": wait,
            "unit": "1",
            "begin_seconds": begin,
            "workers": size,
        }


def main() -> int:
    """Print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="photographs: a Parquet file in the Hugging Face image layout")
    parser.add_argument("--images-per-step", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=["measured", "paper"], default=["measured", "paper"])
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    options = parser.parse_args()
    context = describe_machine("torch", "ray", "simplejpeg", "opencv-python-headless")
    print(", ".join(f"{name} {value}" for name, value in context.items()))
    with open_results(options.json, context | {"images_per_step": options.images_per_step}) as keep:
        if "measured" in options.only:
            with _data(options.data) as data:
                for result in measured(data, options.images_per_step, options.steps):
                    keep([result])
        if "paper" in options.only:
            for result in paper():
                keep([result])
    return 0


@contextmanager
def _data(path: Path | None) -> Iterator[str]:
    """Yield a source of photographs; None: a folder of made-up ones."""
    if path is not None:
        yield str(path.absolute())
        return
    with tempfile.TemporaryDirectory() as folder:
        for index, image in enumerate(load_photographs(None, 128).images):
            place = Path(folder) / "photographs" / f"{index:04}.jpg"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(image)
        yield folder


if __name__ == "__main__":
    sys.exit(main())
