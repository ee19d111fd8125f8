"""Do the runs of a comparison on Ray, side by side where resources allow; what is done is not done again.

Two ways. `inline`: each run is one Ray task that renders its views itself: the most runs on few CPUs, for single-trainer
runs. `workers`: each run has view workers and trainers of its own, as pretrain.py starts them. Both give the same bits.
"""

import dataclasses
import json
import logging
import os
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
from hvp_ray.comparison.step_cost import StepCost, measure_step_costs
from hvp_ray.config import RunConfig, config_from_dict, config_to_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import ConfigError, StageError
from hvp_ray.training.launch import Watchers, launch
from hvp_ray.training.local import pretrain_in_process
from hvp_ray.training.preparation import is_finished

Mode = Literal["inline", "workers"]

_POLL_SECONDS = 1.0


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


def connect(base: RunConfig) -> str:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray; return what trainers run on: cpu or cuda.

    Raises:
        ConfigError: GPUs are asked for that are not there.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    if not ray.is_initialized():
        if "RAY_ADDRESS" in os.environ:
            ray.init(**quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=2**29, **quiet)
    gpus, wanted = ray.cluster_resources().get("GPU", 0.0), base.cluster.num_trainers
    if base.cluster.device == "cuda" and gpus < wanted:
        raise ConfigError(f"cluster.device=cuda needs {wanted} GPU(s), the cluster has {gpus:g}")
    if base.cluster.device != "auto":
        return base.cluster.device
    return "cuda" if gpus >= wanted else "cpu"


def choose_mode(base: RunConfig, device: str) -> Mode:
    """Return `inline` for runs of one trainer on a CPU, else `workers`."""
    return "inline" if base.cluster.num_trainers == 1 and device == "cpu" else "workers"


def num_parallel(base: RunConfig, mode: Mode, device: str) -> int:
    """Return how many runs fit the cluster side by side.

    Raises:
        ConfigError: not one.
    """
    cluster, resources = base.cluster, ray.cluster_resources()
    if mode == "inline":
        needs = {"CPU": float(base.training.torch_threads)}
    else:
        workers = 1 if cluster.num_view_workers == "auto" else cluster.num_view_workers
        needs = {"CPU": cluster.num_trainers * cluster.cpus_with_finishers + workers * cluster.cpus_per_view_worker}
        if device == "cuda":
            share = 1.0 if cluster.gpus_per_trainer == "auto" else cluster.gpus_per_trainer
            needs["GPU"] = cluster.num_trainers * share
            if cluster.renderer == "dali-gpu" and share < 1.0:
                needs["GPU"] += workers * cluster.gpus_per_dali_worker
    fits = min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items() if amount > 0)
    if fits < 1:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in needs.items())
        raise ConfigError(f"one run of this comparison needs {wanted}, the cluster has {_text(resources)}")
    return fits


def do_runs(runs: Sequence[PlannedRun], output: Path, *, mode: Mode, parallel: int, show: ShowProgress) -> None:
    """Do what is not done yet, in order, `parallel` at once.

    Raises:
        StageError: some run failed; the others were done. Starting again does only what is missing.
    """
    missing = [run for run in runs if not is_done(run)]
    work = _work_inline if mode == "inline" else partial(_work_with_workers, alone=parallel == 1)
    failures: dict[str, BaseException] = {}
    with ThreadPoolExecutor(max_workers=max(1, min(parallel, len(missing) or 1))) as pool:
        futures: dict[Future[None], PlannedRun] = {pool.submit(work, run): run for run in missing}
        try:
            while futures:
                for future in [future for future in futures if future.done()]:
                    error = future.exception()
                    run = futures.pop(future)
                    if error is not None:
                        failures[str(run.config.run.name)] = error
                show(_progress(runs, output))
                time.sleep(_POLL_SECONDS)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        text = "\n".join(f"  {name}: {_first_line(error)}" for name, error in failures.items())
        raise StageError(f"{len(failures)} run(s) failed; start the comparison again to go on:\n{text}")


def is_done(run: PlannedRun) -> bool:
    """Tell whether a run has finished: the planned one, not any run of its name."""
    return is_finished(run.config, run.identity)


def measure_on_cluster(base: RunConfig, arm_names: Sequence[str], device: str) -> dict[str, StepCost]:
    """Measure the cost of a step of every arm, where a trainer would run; see `step_cost.py`."""
    task = _measure_task.options(num_cpus=base.training.torch_threads, num_gpus=1 if device == "cuda" else 0)
    costs: dict[str, StepCost] = ray.get(task.remote(config_to_dict(base), list(arm_names), device))
    return costs


@ray.remote(max_retries=2)
def _measure_task(config: dict[str, Any], arm_names: list[str], device: str) -> dict[str, StepCost]:
    base = config_from_dict(config)
    arms = [get_arm(name) for name in arm_names]
    return measure_step_costs(base, arms, open_dataset(base.data), device=torch.device(device))


@ray.remote(max_retries=2)
def _pretrain_task(config: dict[str, Any]) -> None:
    """Do one run in this process."""
    logging.getLogger("hvp_ray").setLevel(logging.ERROR)
    pretrain_in_process(config_from_dict(config))


def _work_inline(run: PlannedRun) -> None:
    threads = run.config.training.torch_threads
    ray.get(_pretrain_task.options(num_cpus=threads, name=run.config.run.name).remote(config_to_dict(run.config)))


def _work_with_workers(run: PlannedRun, *, alone: bool) -> None:
    config = run.config
    if not alone and config.cluster.batches_in_flight == "auto":
        # Each run would size its look-ahead for the whole object store.
        config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, batches_in_flight=4))
    quiet = Watchers(announce=lambda _: None, show_progress=lambda _: None, show_message=lambda _: None)
    launch(config, quiet)


def _progress(runs: Sequence[PlannedRun], output: Path) -> ComparisonProgress:
    running, steps, done = {}, 0, 0
    for run in runs:
        name = str(run.config.run.name)
        if is_done(run):
            done, steps = done + 1, steps + run.num_steps
            continue
        step = _last_step(output / name / "metrics.jsonl")
        if step:
            running[name], steps = step / run.num_steps, steps + step
    num_steps = sum(run.num_steps for run in runs)
    return ComparisonProgress(num_done=done, num_runs=len(runs), steps_done=steps, num_steps=num_steps, running=running)


def _last_step(journal: Path) -> int:
    """Return the last recorded step, from the journal's last lines."""
    try:
        with journal.open("rb") as file:
            file.seek(max(0, os.path.getsize(journal) - 8192))
            lines = [line for line in file.read().split(b"\n") if line.startswith(b'{"step"')]
        return int(json.loads(lines[-2 if len(lines) > 1 else -1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _text(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
