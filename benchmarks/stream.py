"""Does the trainer wait for views? The pool and its stream beside other ways to bring the same batches, in one run.

python benchmarks/stream.py [--data PARQUET] [--parts PART ...] [--workers N ...] [--images-per-step N] [--json FILE]

loops: a trainer whose step is a timed wait, so long that the pool's rendering capacity, measured just before, is
--capacity times what the trainer needs. Subjects, all with the product's render_batch and the same steps: hvp_ray (view
workers, object store, stream), headroom (one cached batch, again and again), inline (rendered in the trainer's process),
ray_data (map_batches), torch_dataloader.
  wait: share of the time since the first batch that the trainer stood still, and milliseconds before a step in the first
  epoch, at the first step of later epochs, and elsewhere.
  first batch: hvp_ray's is counted from the first request of a new pool whose workers are up (their start is beside it);
  the peers start their workers when they are asked for the first batch.
  CPU outside rendering: what the processes that render, the trainer's process and the raylets (with the object store)
  spent besides render_batch, as a share of render_batch, from standstill to standstill. net: without what they
  spend in the same time at standstill; for hvp_ray this is stream.transport_cpu_fraction, with all memory of the store
  touched by all workers before. "cold store" are the first batches of a new pool, which pay for that. The first epoch of
  the peers is not counted. (rest): Ray's other processes, control service and agents.

transport: view workers that render once and return it again and again, as fast as it goes: GB/s and CPU time. nodes: the
same between two raylets on this machine, or, where RAY_ADDRESS names a cluster (`ray job submit -- python
benchmarks/stream.py --parts nodes`), to this node from nodes with the resource `view`. training: a small network really
trained, by the product as pretrain.py starts it, inline, and on one cached batch; on CPUs such a step takes longer than
rendering.

Without --data photographs are made up. Takes 4 GB of memory with the default sizes, and about five minutes on 2 cores.
"""

import argparse
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)  # this checkout, wherever it is started from
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])  # Ray's processes too

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import cv2
import ray
import torch

from benchmarks.headroom import timed_headroom
from benchmarks.results_file import Result, Results, describe_machine, open_results
from benchmarks.streams import peers, training, transport
from benchmarks.streams.cpu_time import CpuSpent, CpuTimes, cpu_spent, read_cpu_times
from benchmarks.streams.setting import Setting, build_setting, requests_of
from benchmarks.streams.timed_loop import LoopTimes, run_timed
from benchmarks.streams.touched_store import touch_store
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.pool import ViewWorkerPool, start_pool
from hvp_ray.stream.spilling import spilled_bytes
from hvp_ray.stream.view_stream import ViewStream

IDLE_SECONDS = 4.0
COLD = "hvp_ray, cold store"
ONE_NODE = "one node"
PARTS = ("loops", "transport", "nodes", "training")
PEERS = {"ray_data": peers.ray_data_batches, "torch_dataloader": peers.torch_dataloader_batches}
TARGETS = {"wait_fraction": 0.02, "share_of_headroom": 0.95, "first_batch_seconds": 3.0, "transport_cpu_fraction": 0.03}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One subject with a number of workers."""

    subject: str
    workers: int
    times: LoopTimes
    first_batch_seconds: float
    start_seconds: float = 0.0
    """Until the workers were up, where that is apart from the first batch."""
    render_cpu_seconds: float = 0.0
    cpu: CpuSpent | None = None
    """Spent while `render_cpu_seconds` were rendered."""
    idle_cpu: CpuSpent | None = None
    """What the same processes spend in the same time at standstill."""

    def outside_rendering(self, kind: str) -> float:
        """CPU time of `kind` outside rendering, as a share of rendering."""
        if self.cpu is None:
            return math.nan
        seconds: float = getattr(self.cpu, kind)
        if kind in ("workers", "outside_rest"):
            seconds -= self.render_cpu_seconds
        return seconds / self.render_cpu_seconds

    @property
    def net_fraction(self) -> float:
        """CPU time outside rendering above that at standstill, as a share of rendering; nan: standstill is not known."""
        if self.idle_cpu is None:
            return math.nan
        return self.outside_rendering("outside_rest") - self.idle_cpu.outside_rest / self.render_cpu_seconds


@dataclass(slots=True)
class Collected:
    """What the batches of a peer say, from the second epoch on."""

    render_cpu_seconds: float = 0.0
    process_ids: set[int] = field(default_factory=set)
    marks: list[CpuTimes] = field(default_factory=list)

    def mark(self, _epochs_done: int) -> None:
        self.marks.append(read_cpu_times())

    def take(self, batch: peers.PeerBatch) -> object:
        self.process_ids.add(batch.process_id)
        if self.marks:
            self.render_cpu_seconds += batch.render_cpu_seconds
        return batch.pixels


def measure_loops(setting: Setting, workers: int, capacity_ratio: float, subjects: list[str]) -> Iterator[Measured]:
    """Measure all subjects with so many workers; the pool comes first, because its capacity sets the step."""
    started = time.perf_counter()
    pool = start_pool(setting.config, "cpu", workers, {"CPU": 1.0})
    process_ids = ray.get([worker.process_id.remote() for worker in pool.workers.values()])
    start_seconds = time.perf_counter() - started
    try:
        before = read_cpu_times()
        time.sleep(IDLE_SECONDS)
        idle_cpu = cpu_spent(before, read_cpu_times(), workers=process_ids).times(1 / IDLE_SECONDS)
        cold, cold_cpu_seconds, cold_cpu = _with_pool(pool, process_ids, setting, steps=1 + workers, step_seconds=0.0)
        touched = ray.get([worker.__ray_call__.remote(touch_store) for worker in pool.workers.values()])
        free, _, _ = _with_pool(pool, process_ids, setting, steps=4 + 2 * workers, step_seconds=0.0)
        # Batches are in hand one after the other without a step, so waits are the time between them.
        capacity = setting.images_per_step * (len(free.waits) - workers) / sum(free.waits[workers:])
        step_seconds = capacity_ratio * setting.images_per_step / capacity
        print(
            f"\n{workers} worker{'s' * (workers > 1)}: {capacity:.0f} images/s when nothing holds them up, so a step of "
            f"{step_seconds:.3f} s; {min(touched) / 2**20:.0f} MiB of the store touched"
        )
        cached = training.CachedBatches(training.first_batch(setting.config))
        headroom = timed_headroom(setting, cached, step_seconds=step_seconds, steps=4)
        yield Measured(subject="headroom", workers=workers, times=headroom, first_batch_seconds=headroom.waits[0])
        times, render_cpu_seconds, cpu = _with_pool(
            pool, process_ids, setting, steps=setting.num_steps, step_seconds=step_seconds
        )
        yield Measured(
            subject="hvp_ray",
            workers=workers,
            times=times,
            first_batch_seconds=cold.waits[0],
            start_seconds=start_seconds,
            render_cpu_seconds=render_cpu_seconds,
            cpu=cpu,
            idle_cpu=idle_cpu.times(times.waits[0] + times.seconds),
        )
        yield Measured(
            subject=COLD,
            workers=workers,
            times=cold,
            first_batch_seconds=cold.waits[0],
            start_seconds=start_seconds,
            render_cpu_seconds=cold_cpu_seconds,
            cpu=cold_cpu,
            idle_cpu=idle_cpu.times(cold.waits[0] + cold.seconds),
        )
    finally:
        pool.close()
    if "inline" in subjects:
        inline = training.inline_batches(setting.config)
        steps = min(setting.num_steps, setting.steps_per_epoch + 2)
        times = _timed(setting, inline.next_batch, steps=steps, step_seconds=step_seconds)
        yield Measured(subject="inline", workers=workers, times=times, first_batch_seconds=times.waits[0])
    for subject, batches_of in PEERS.items():
        if subject in subjects:
            yield _measure_peer(subject, batches_of, setting, workers, step_seconds)


def _with_pool(
    pool: ViewWorkerPool, process_ids: list[int], setting: Setting, *, steps: int, step_seconds: float
) -> tuple[LoopTimes, float, CpuSpent]:
    """Run a loop on the product's stream; return its times, the CPU time of rendering, and all CPU time."""
    before = read_cpu_times()
    stream = ViewStream(
        pool.workers,
        requests_of(setting.config),
        range(steps),
        cluster=setting.config.cluster,
        copy_to_device=CopyToDevice(training.CPU),
    )
    try:
        times = _timed(setting, stream.next_batch, steps=steps, step_seconds=step_seconds)
    finally:
        stream.close()
    spent = cpu_spent(before, read_cpu_times(), workers=process_ids)
    return times, stream.stats.render_cpu_seconds, spent


def _measure_peer(
    subject: str,
    batches_of: Callable[[Setting, int, peers.BetweenEpochs], Iterator[peers.PeerBatch]],
    setting: Setting,
    workers: int,
    step_seconds: float,
) -> Measured:
    collected = Collected()
    batches = batches_of(setting, workers, collected.mark)
    times = _timed(setting, lambda: collected.take(next(batches)), steps=setting.num_steps, step_seconds=step_seconds)
    next(batches, None)  # the last mark
    return Measured(
        subject=subject,
        workers=workers,
        times=times,
        first_batch_seconds=times.waits[0],
        render_cpu_seconds=collected.render_cpu_seconds,
        cpu=cpu_spent(collected.marks[0], collected.marks[-1], workers=collected.process_ids),
    )


def _timed(setting: Setting, next_batch: Callable[[], object], *, steps: int, step_seconds: float) -> LoopTimes:
    return run_timed(
        next_batch,
        steps=steps,
        step_seconds=step_seconds,
        images_per_step=setting.images_per_step,
        steps_per_epoch=setting.steps_per_epoch,
    )


def report_loops(measured: Iterator[Measured]) -> Results:
    """Print a line for each subject as it is measured; yield the results."""
    print(f"{'of head-':>36}{'':>8}{'first':>8}{'start':>8}   wait before a step, ms    CPU outside rendering, %")
    columns = {"images/s": 9, "room": 9, "wait %": 8, "batch s": 8, "s": 8, "1st epoch": 11, "boundary": 9, "else": 7}
    columns |= dict.fromkeys(("net", "all", "workers", "trainer", "raylets", "(rest)"), 8)
    print(f"{'subject':<18}" + "".join(f"{column:>{width}}" for column, width in columns.items()))
    headroom = math.nan
    for one in measured:
        if one.subject == "headroom":
            headroom = one.times.images_per_second
        share = one.times.images_per_second / headroom
        print(_line(one, share), flush=True)
        yield from _cpu_results(one) if one.subject == COLD else _results_of(one, share)


def _line(one: Measured, share: float) -> str:
    def number(value: float, width: int, form: str) -> str:
        return f"{'' if math.isnan(value) else format(value, form):>{width}}"

    times = one.times
    kinds = ("outside_rest", "workers", "consumer", "raylets", "rest")
    cpu_cells = [number(100 * one.net_fraction, 8, ".2f")]
    cpu_cells += [number(100 * one.outside_rendering(kind), 8, ".2f") for kind in kinds]
    if one.subject == COLD:  # it has no step
        return f"{one.subject:<78}" + "".join(cpu_cells)
    waits = (times.first_epoch_wait_seconds, times.boundary_wait_seconds, times.later_wait_seconds)
    cells = [number(times.images_per_second, 9, ".1f"), number(share, 9, ".3f")]
    cells += [number(100 * times.wait_fraction, 8, ".2f"), number(one.first_batch_seconds, 8, ".2f")]
    cells += [number(one.start_seconds or math.nan, 8, ".2f")]
    cells += [number(1000 * wait, width, ".0f") for wait, width in zip(waits, (11, 9, 7), strict=True)]
    return f"{one.subject:<18}" + "".join([*cells, *cpu_cells])


def _results_of(one: Measured, share: float) -> Results:
    name, times = f"stream.{one.subject}", one.times
    context = _context(one)
    speed = {"value": times.images_per_second, "unit": "images/s", "share_of_headroom": share}
    yield {"name": f"{name}.images_per_second"} | speed | context
    means = {
        "first_epoch_wait_seconds": times.first_epoch_wait_seconds,
        "boundary_wait_seconds": times.boundary_wait_seconds,
        "later_wait_seconds": times.later_wait_seconds,
    }
    waits: Result = {name: mean for name, mean in means.items() if not math.isnan(mean)}
    waits["waits_seconds"] = [round(wait, 4) for wait in times.waits]
    yield {"name": f"{name}.wait_fraction", "value": times.wait_fraction, "unit": "1"} | waits | context
    first = {"name": f"{name}.first_batch_seconds", "value": one.first_batch_seconds, "unit": "s"}
    yield first | {"start_of_workers_before_seconds": one.start_seconds} | context
    yield from _cpu_results(one)


def _cpu_results(one: Measured) -> Results:
    if one.cpu is None:
        return
    quantity = {"hvp_ray": "transport_cpu_fraction", COLD: "transport_cold_cpu_fraction"}.get(
        one.subject, f"{one.subject}.cpu_outside_rendering_fraction"
    )
    fractions = {f"{kind}_fraction": one.outside_rendering(kind) for kind in ("workers", "consumer", "raylets", "rest")}
    gross = one.outside_rendering("outside_rest")
    is_net = one.idle_cpu is not None
    value = {"value": one.net_fraction if is_net else gross, "unit": "of rendering CPU", "with_standstill": gross}
    render = {"render_cpu_seconds": one.render_cpu_seconds}
    yield {"name": f"stream.{quantity}"} | value | fractions | render | _context(one)


def _context(one: Measured) -> Result:
    has_workers = one.subject not in ("headroom", "inline")
    workers = {"workers": one.workers if has_workers else 0, "step_of_workers": one.workers}
    return workers | {"step_seconds": one.times.step_seconds, "steps": len(one.times.waits)}


def judge(results: list[Result]) -> None:
    """Say which targets are met, and where a peer is ahead."""
    for one in results:
        for target, limit in TARGETS.items():
            ours = one["name"] in (f"stream.hvp_ray.{target}", f"stream.{target}")
            value = one["value"] if ours else None
            if target == "share_of_headroom" and one["name"] == "stream.hvp_ray.images_per_second":
                value = one["share_of_headroom"]
            if value is not None:
                is_met = value >= limit if target == "share_of_headroom" else value <= limit
                bound = "at least" if target == "share_of_headroom" else "at most"
                said = f"{target} {value:.3f}, {bound} {limit:g}: {'met' if is_met else 'MISSED'}"
                print(f"{one['workers']} workers: {said}")
    for workers in sorted({one["step_of_workers"] for one in results}):
        named = {one["name"]: one for one in results if one["step_of_workers"] == workers}
        for quantity, sign in (("images_per_second", 1), ("wait_fraction", -1), ("first_batch_seconds", -1)):
            scores = {
                subject: sign * (one["value"] + one.get("start_of_workers_before_seconds", 0.0))
                for subject in ("hvp_ray", "inline", *PEERS)
                if (one := named.get(f"stream.{subject}.{quantity}")) is not None
            }
            ahead = [subject for subject, score in scores.items() if score > scores["hvp_ray"]]
            said = f"{quantity}, with the start of workers" if quantity == "first_batch_seconds" else quantity
            print(f"{workers} workers, {said}: ahead of hvp_ray: {', '.join(ahead) or 'none'}")


def measure_transport(setting: Setting, path: str, steps: int, resources: dict[str, float]) -> Results:
    """GB/s and CPU time without rendering, with one worker and with two."""
    quantity = "transport" if path == ONE_NODE else "transport_between_nodes"
    for workers in (1, 2):
        one = transport.measure_transport(setting, workers, steps, resources)
        milliseconds = {"copy_out_cpu_ms": 1000 * one.copy_cpu_seconds}
        for kind in ("workers", "consumer", "raylets"):
            if one.cpu is not None:
                milliseconds[f"{kind}_cpu_ms"] = 1000 * getattr(one.cpu, kind) / steps
        print(
            f"{path}, {workers} worker{'s' * (workers > 1)}: {one.gigabytes_per_second:.2f} GB/s; of a batch of "
            f"{setting.batch_bytes / 1e6:.0f} MB: " + ", ".join(f"{k} {v:.1f}" for k, v in milliseconds.items())
        )
        value = {"value": one.gigabytes_per_second, "unit": "GB/s"}
        context = {"path": path, "workers": workers, "steps": steps, "batch_bytes": setting.batch_bytes}
        yield {"name": f"stream.{quantity}_gigabytes_per_second"} | value | context | milliseconds


def measure_training(options: argparse.Namespace, folder: Path) -> Results:
    """A network that is really trained."""
    setting = build_setting(
        data=options.data,
        folder=folder,
        images_per_step=options.training_images,
        size_px=96,
        steps_per_epoch=4,
        epochs=1,
    )
    config = training.with_small_network(setting, options.backbone)
    steps = options.training_steps
    headroom = training.training_headroom(config, steps)
    inline = training.training_inline(config, steps)
    launched, spilled = training.training_launched(config, steps, 1)
    images = config.training.images_per_step
    print(f"\nreally training: SimSiam, {options.backbone}, {images} images of 4 views of 96 px, {steps} steps")
    for subject, speed in (("headroom", headroom), ("inline", inline), ("hvp_ray", launched)):
        share = speed.images_per_second / headroom.images_per_second
        print(
            f"{subject:<18}{speed.images_per_second:>9.1f} images/s{share:>9.3f} of headroom, waiting "
            f"{100 * speed.wait_fraction:.2f} %, first batch {speed.first_batch_seconds:.2f} s"
        )
        yield {
            "name": f"training.{subject}.images_per_second",
            "value": speed.images_per_second,
            "unit": "images/s",
            "share_of_headroom": share,
            "data_wait_fraction": speed.wait_fraction,
            "first_batch_seconds": speed.first_batch_seconds,
            "backbone": options.backbone,
            "images_per_step": images,
            "steps": steps,
        }
    yield {"name": "training.hvp_ray.spilled_bytes", "value": spilled, "unit": "bytes"}


def measure(options: argparse.Namespace, folder: Path) -> Results:
    setting = build_setting(
        data=options.data,
        folder=folder,
        images_per_step=options.images_per_step,
        size_px=options.size_px,
        steps_per_epoch=options.steps_per_epoch,
        epochs=options.epochs,
    )
    print(
        f"batches of {setting.images_per_step} images, 4 views of {options.size_px} px: {setting.batch_bytes / 1e6:.0f} MB; "
        f"{setting.epochs} epochs of {setting.steps_per_epoch} steps; store of {setting.store_bytes / 2**30:.1f} GiB"
    )
    results: list[Result] = []
    if set(options.parts) - {"nodes"}:
        ray.init(
            address="local",
            num_cpus=max(options.workers) + 2,
            object_store_memory=setting.store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        try:
            for workers in options.workers if "loops" in options.parts else []:
                for result in report_loops(measure_loops(setting, workers, options.capacity, options.subjects)):
                    results.append(result)
                    yield result
            if "transport" in options.parts:
                yield from measure_transport(setting, ONE_NODE, options.transport_steps, {})
            if "training" in options.parts:
                (folder / "training").mkdir()
                yield from measure_training(options, folder / "training")
            yield {"name": "stream.spilled_bytes", "value": spilled_bytes(), "unit": "bytes"}
        finally:
            ray.shutdown()
    if "nodes" in options.parts:
        with transport.two_nodes(setting.store_bytes) as path:
            yield from measure_transport(setting, path, options.transport_steps, {"view": 1.0})
    print()
    if results:
        judge(results)


def parse_options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Parquet file with photographs (default: made-up ones)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    subjects = ["inline", *PEERS]
    parser.add_argument("--subjects", nargs="*", choices=subjects, default=subjects, help="beside hvp_ray and headroom")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="numbers of view workers")
    parser.add_argument("--images-per-step", type=int, default=256, help="of the trainer")
    parser.add_argument("--size-px", type=int, default=224, help="of a view")
    parser.add_argument("--steps-per-epoch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4, help="2 or more")
    parser.add_argument("--capacity", type=float, default=1.2, help="rendering capacity / what the trainer needs")
    parser.add_argument("--transport-steps", type=int, default=30, help="batches of the part transport")
    parser.add_argument("--backbone", default="resnet10t", help="timm name, for the part training")
    parser.add_argument("--training-images", type=int, default=32, help="images of a step of the part training")
    parser.add_argument("--training-steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write one JSON object a line, each as soon as it is measured")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs: 2 or more, because the first one is not counted everywhere")
    return options


def main() -> int:
    options = parse_options()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    machine = describe_machine("ray", "torch", "numpy", "opencv-python-headless", "simplejpeg", "pyarrow")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    sizes = {"images_per_step": options.images_per_step, "size_px": options.size_px, "capacity_ratio": options.capacity}
    context = machine | {"data": options.data.name if options.data else "made-up"}
    with tempfile.TemporaryDirectory(prefix="hvp-stream-") as folder, open_results(options.json, context) as keep:
        for result in measure(options, Path(folder)):
            keep([sizes | result])
    return 0


if __name__ == "__main__":
    sys.exit(main())
