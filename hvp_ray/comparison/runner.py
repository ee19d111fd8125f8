"""Do the runs of a comparison on Ray, side by side where resources allow; what is done is not done again.

Two ways. `inline`: each run is one Ray task that renders its views itself: the most runs on few CPUs, for single-trainer
runs. `workers`: each run has view workers and trainers of its own, as pretrain.py starts them. Both give the same bits.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
import torch

from hvp_ray.comparison.arms import PlannedRun, get_arm
from hvp_ray.comparison.results import METRIC_TITLES
from hvp_ray.comparison.step_cost import StepCost, measure_step_costs
from hvp_ray.config import RunConfig, config_from_dict, config_to_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import ConfigError, StageError
from hvp_ray.identity import Identity
from hvp_ray.launch.driver import Watchers, decoded_bytes_of, launch, num_side_by_side
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.launch.stop import RayProcesses, StopRequest, stop_on_signals
from hvp_ray.runs.after_training import MAX_DEATHS, forgive_death
from hvp_ray.runs.prepare import is_finished, output_folder
from hvp_ray.stream.capacity import num_processes_that_fit, plan_local_ray, room_for, this_machine
from hvp_ray.stream.connect import LocalRay, connect_ray, joins_cluster
from hvp_ray.tracking.run_log import last_recorded_step

Mode = Literal["inline", "workers"]
Device = Literal["cpu", "cuda"]

_POLL_SECONDS = 1.0
_STOP_PATIENCE_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonProgress:
    """How far a comparison is."""

    num_done: int
    num_runs: int
    steps_done: int
    num_steps: int
    running: dict[str, float]
    """Name of a run at work -> share done."""


ShowProgress = Callable[[ComparisonProgress], None]


def connect(base: RunConfig, views: Mode | Literal["auto"]) -> Device:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray; return what trainers run on.

    Args:
        base: what all runs have in common.
        views: who renders, if it is decided already.

    Raises:
        ConfigError: no cluster answers, this machine is too small, or GPUs are asked for that are not there.
    """

    def size_of_local() -> LocalRay:
        machine = this_machine()
        size = plan_local_ray(base, machine, decoded_bytes_of(base))
        renders_inline = views != "workers" and base.cluster.num_trainers == 1
        cpus = machine.num_cpus if renders_inline else size.num_cpus
        return dataclasses.replace(size, num_cpus=max(cpus, base.training.torch_threads))

    connect_ray(size_of_local)
    gpus, wanted = ray.cluster_resources().get("GPU", 0.0), base.cluster.num_trainers
    if base.cluster.device == "cuda" and gpus < wanted:
        raise ConfigError(f"cluster.device=cuda needs {wanted} GPU(s), the cluster has {gpus:g}")
    if base.cluster.device != "auto":
        return base.cluster.device
    return "cuda" if gpus >= wanted else "cpu"


def choose_mode(base: RunConfig, device: Device) -> Mode:
    """Return `inline` for runs of one trainer on a CPU, else `workers`."""
    return "inline" if base.cluster.num_trainers == 1 and device == "cpu" else "workers"


def num_parallel(runs: Sequence[PlannedRun], mode: Mode, *, wanted: int | None) -> int:
    """Return how many runs are done side by side.

    Args:
        runs: of the comparison; those that are done are not counted.
        mode: who renders.
        wanted: None: as many as fit.

    Raises:
        ConfigError: not one run fits the cluster, or fewer than wanted.
    """
    missing = [run for run in runs if not is_done(run)]
    fits = len(missing) if wanted is None else min(wanted, len(missing))
    if not missing:
        return 1
    for config in {run.arm.name: run.config for run in missing}.values():
        threads = config.training.torch_threads
        fits = num_side_by_side(config, fits) if mode == "workers" else min(fits, _num_inline(threads))
    if wanted is not None and fits < min(wanted, len(missing)):
        raise ConfigError(
            f"--parallel {wanted} is not allowed: {fits} run(s) of this comparison fit the cluster at once; give "
            f"--parallel {fits}"
        )
    return fits


def _num_inline(threads: int) -> int:
    """Return how many tasks of this many CPUs the cluster's nodes can take at once; a local Ray also as its memory allows.

    Raises:
        ConfigError: not one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = sum(room_for(node, {"CPU": float(threads)}) for node in nodes)
    if fits < 1:
        raise ConfigError(
            f"training.torch_threads={threads} needs a node of as many CPUs, and the largest has "
            f"{max(node.get('CPU', 0.0) for node in nodes):g}; lower it"
        )
    return fits if joins_cluster() else max(1, min(fits, num_processes_that_fit(this_machine())))


def do_runs(runs: Sequence[PlannedRun], output: Path, *, mode: Mode, parallel: int, show: ShowProgress) -> None:
    """Do what is not done yet, in order, `parallel` at once.

    SIGTERM and the first Ctrl-C stop the runs under way after a checkpoint, a second Ctrl-C stops them at once.

    Raises:
        StageError: some run failed; the others were done. Starting again does only what is missing.
        KeyboardInterrupt: the runs were stopped.
    """
    missing = [run for run in runs if not is_done(run)]
    stop = StopRequest()
    work = _work_inline if mode == "inline" else partial(_work_with_workers, num_sharing=parallel)
    failures: dict[str, BaseException] = {}
    with (
        ThreadPoolExecutor(max_workers=max(1, min(parallel, len(missing) or 1))) as pool,
        stop_on_signals(stop, patience_seconds=_STOP_PATIENCE_SECONDS),
    ):
        futures: dict[Future[None], PlannedRun] = {pool.submit(work, run, stop): run for run in missing}
        try:
            while futures:
                for future in [future for future in futures if future.done()]:
                    run = futures.pop(future)
                    if not future.cancelled() and (error := future.exception()) is not None:
                        failures[str(run.config.run.name)] = error
                show(_progress(runs, output))
                if stop.is_asked:
                    pool.shutdown(wait=False, cancel_futures=True)
                time.sleep(_POLL_SECONDS)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop.ask(patience_seconds=0.0)  # the threads that are waited for return at once
            raise
    if stop.is_asked:
        raise KeyboardInterrupt
    if failures:
        text = "\n".join(f"  {name}: {_first_line(error)}" for name, error in failures.items())
        raise StageError(f"{len(failures)} run(s) failed; start the comparison again to go on:\n{text}")


def is_done(run: PlannedRun) -> bool:
    """Tell whether a run has finished with the values that are compared: the planned one, not any run of its name.

    One whose evaluation failed is started again: it trains no step, and evaluates.
    """
    if not is_finished(run.config, run.identity):
        return False
    summary = json.loads((output_folder(run.config) / run.name / "summary.json").read_text())
    return all(isinstance(summary.get(metric), float) for metric in METRIC_TITLES)


def measure_on_cluster(base: RunConfig, arm_names: Sequence[str], device: Device) -> dict[str, StepCost]:
    """Measure the cost of a step of every arm, where a trainer would run; see `step_cost.py`.

    Raises:
        ConfigError: no node has CPUs for the trainer's threads.
    """
    _num_inline(base.training.torch_threads)
    task = _measure_task.options(num_cpus=base.training.torch_threads, num_gpus=1 if device == "cuda" else 0)
    costs: dict[str, StepCost] = ray.get(task.remote(config_to_dict(base), list(arm_names), device))
    return costs


@ray.remote(max_retries=2)
def _measure_task(config: dict[str, Any], arm_names: list[str], device: str) -> dict[str, StepCost]:
    base = config_from_dict(config)
    arms = [get_arm(name) for name in arm_names]
    return measure_step_costs(base, arms, open_dataset(base.data), device=torch.device(device))


@ray.remote(max_retries=MAX_DEATHS)
def _pretrain_task(config: dict[str, Any], planned: Identity) -> None:
    """Do one run in this process; `ray.cancel`, which arrives as SIGINT, stops it after a checkpoint."""
    logging.getLogger("hvp_ray").setLevel(logging.ERROR)
    stop = StopRequest()
    with stop_on_signals(stop):
        pretrain_in_process(
            config_from_dict(config),
            report_progress=lambda _progress: stop.is_asked,
            is_stop_asked=lambda: stop.is_asked,
            planned=planned,
        )


def _work_inline(run: PlannedRun, stop: StopRequest) -> None:
    threads = run.config.training.torch_threads
    options = {"num_cpus": threads, "name": run.config.run.name}
    task = _pretrain_task.options(**options).remote(config_to_dict(run.config), run.identity)
    was_cancelled, was_forced, ray_processes = False, False, RayProcesses(stop)
    while not ray.wait([task], timeout=_POLL_SECONDS)[0]:
        ray_processes.check()
        if stop.is_asked and not was_cancelled:
            ray.cancel(task)
            was_cancelled = True
        if stop.is_overdue:
            ray.cancel(task, force=True)
            was_forced = True
    try:
        ray.get(task)
    finally:
        if was_forced:
            forgive_death(str(output_folder(run.config) / run.name))


def _work_with_workers(run: PlannedRun, stop: StopRequest, *, num_sharing: int) -> None:
    quiet = Watchers(announce=lambda _: None, show_progress=lambda _: None, show_message=lambda _: None)
    launch(run.config, quiet, num_sharing=num_sharing, stop=stop, planned=run.identity)


def _progress(runs: Sequence[PlannedRun], output: Path) -> ComparisonProgress:
    running, steps, done = {}, 0, 0
    for run in runs:
        name = str(run.config.run.name)
        if is_done(run):
            done, steps = done + 1, steps + run.num_steps
            continue
        step = last_recorded_step(output / name)
        if step:
            running[name], steps = step / run.num_steps, steps + step
    num_steps = sum(run.num_steps for run in runs)
    return ComparisonProgress(num_done=done, num_runs=len(runs), steps_done=steps, num_steps=num_steps, running=running)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
