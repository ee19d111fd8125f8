"""Do the runs of a comparison on Ray, side by side if resources allow. A finished run is not repeated.

There are two modes, which give the same bits. `inline`: each run is one Ray task that renders its own views
(`inline_runs.py`). Most runs of one trainer fit few CPUs in this way. `workers`: each run has view workers and trainers, as
hvp-ray pretrain starts them.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import ray
import torch

from hvp_ray.comparison.arms import get_arm
from hvp_ray.comparison.inline_runs import check_nodes, do_inline, record_digest, resources_of_inline
from hvp_ray.comparison.progress import ProgressReader, ShowProgress
from hvp_ray.comparison.results import METRIC_TITLES
from hvp_ray.comparison.step_cost import StepCost, measure_step_costs
from hvp_ray.comparison.study import PlannedRun, Study
from hvp_ray.config import ClusterConfig, RunConfig, config_from_dict, config_to_dict
from hvp_ray.costs.prefetch import step_bytes
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.errors import ConfigError, StageError
from hvp_ray.launch.driver import launch, num_side_by_side, read_cluster
from hvp_ray.launch.local_cluster import plan_local_ray
from hvp_ray.launch.placement import Resources, resolve_device, room_for
from hvp_ray.launch.stop import StopRequest, stop_on_signals
from hvp_ray.launch.watch import Watchers
from hvp_ray.resolved_run import Device
from hvp_ray.runs.record import summary_of
from hvp_ray.stream.connect import LocalRay, connect_ray, joins_cluster
from hvp_ray.stream.machine import num_processes_that_fit, this_machine

Mode = Literal["inline", "workers"]

_POLL_SECONDS = 1.0
_STOP_PATIENCE_SECONDS = 15.0


def connect(base: RunConfig, dataset: Dataset, mode: Mode | None) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray.

    Args:
        base: config that all runs share.
        dataset: its data.
        mode: None: it is chosen later, by `choose_mode`.

    Raises:
        ConfigError: no cluster answers, or this machine is too small.
    """

    def size_of_local() -> LocalRay:
        machine = this_machine()
        size = plan_local_ray(base.cluster, machine, step_bytes(base, dataset))
        renders_inline = mode != "workers" and base.cluster.num_trainers == 1
        cpus = machine.num_cpus if renders_inline else size.num_cpus
        return dataclasses.replace(size, num_cpus=max(cpus, base.training.torch_threads))

    connect_ray(size_of_local)


def choose_mode(cluster: ClusterConfig, mode: Mode | None) -> tuple[Mode, Device]:
    """Return mode and device, decided once for all runs of a comparison.

    Args:
        cluster: settings of all runs.
        mode: None: `inline` for runs of one trainer on a CPU, else `workers`.

    Raises:
        ConfigError: the cluster has fewer GPUs than the runs ask for.
    """
    now = dataclasses.replace(cluster, placement="anywhere")  # nodes that may join later do not count
    device = resolve_device(now, ray.cluster_resources().get("GPU", 0.0))
    if mode is None:
        mode = "inline" if cluster.num_trainers == 1 and device == "cpu" else "workers"
    if mode == "inline" and cluster.device != "cuda":
        device = "cpu"
    return mode, device


def num_parallel(runs: Sequence[PlannedRun], dataset: Dataset, mode: Mode, *, wanted: int | None) -> int:
    """Return how many runs are done side by side.

    Args:
        runs: runs of the comparison. Finished ones do not count.
        dataset: their data.
        mode: how the runs render.
        wanted: None: as many as fit.

    Raises:
        ConfigError: the cluster holds no run, or fewer than wanted.
    """
    missing = [run for run in runs if not is_done(run)]
    if not missing:
        return 1
    wanted_here = len(missing) if wanted is None else min(wanted, len(missing))
    fits = wanted_here
    for config in {run.arm.name: run.config for run in missing}.values():
        if mode == "workers":
            fits = num_side_by_side(config, dataset, fits)
        else:
            fits = min(fits, _num_inline(resources_of_inline(config)))
    if wanted is not None and fits < wanted_here:
        raise ConfigError(
            f"--parallel {wanted} is not allowed: {fits} run(s) of this comparison fit the cluster at once; give "
            f"--parallel {fits}"
        )
    return fits


def _num_inline(reserved: Resources) -> int:
    """Return how many tasks with these reservations the cluster runs at once. A local Ray also needs memory for them.

    Raises:
        ConfigError: no node has room for one.
    """
    nodes = read_cluster().nodes
    fits = sum(room_for(node, reserved) for node in nodes)
    if fits < 1:
        threads = f"training.torch_threads={reserved['CPU']:g}"
        if reserved["GPU"]:
            raise ConfigError(f"cluster.device=cuda needs a node with a GPU and {threads} CPUs, and there is none")
        largest = max(node.get("CPU", 0.0) for node in nodes)
        raise ConfigError(f"{threads} needs a node of as many CPUs, and the largest has {largest:g}; lower it")
    return fits if joins_cluster() else max(1, min(fits, num_processes_that_fit(this_machine())))


def do_runs(
    study: Study, *, mode: Mode, parallel: int, show: ShowProgress, check_owner: Callable[[], None] = lambda: None
) -> None:
    """Do the missing runs in order, `parallel` at once.

    SIGTERM and the first Ctrl-C stop the runs in progress after a checkpoint. A second Ctrl-C stops them at once.

    Args:
        study: the comparison.
        mode: how the runs render.
        parallel: runs side by side.
        show: called with the progress, each second.
        check_owner: raises if another process has taken the comparison over; called each second.

    Raises:
        ConfigError: a node that may do runs does not see the comparison's folder.
        LostRunError: see `check_owner`.
        StageError: some run failed. All others were done, and a new start does only what is missing.
        KeyboardInterrupt: the runs were stopped.
    """
    runs = study.runs()
    missing = [run for run in runs if not is_done(run)]
    if not missing:
        return
    stop = StopRequest()
    work = partial(_work_with_workers, num_sharing=parallel)
    if mode == "inline":
        digest = record_digest(study)
        check_nodes(study, digest)
        work = partial(do_inline, digest=digest)
    progress = ProgressReader(runs, {run.name for run in runs} - {run.name for run in missing})
    failures: dict[str, BaseException] = {}
    with (
        ThreadPoolExecutor(max_workers=max(1, min(parallel, len(missing)))) as pool,
        stop_on_signals(stop, patience_seconds=_STOP_PATIENCE_SECONDS),
    ):
        futures: dict[Future[None], PlannedRun] = {pool.submit(work, run, stop): run for run in missing}
        try:
            while futures:
                check_owner()
                for future in [future for future in futures if future.done()]:
                    run = futures.pop(future)
                    if future.cancelled():
                        continue
                    if (error := future.exception()) is not None:
                        failures[run.name] = error
                    elif not stop.is_asked:
                        progress.note_end(run.name)
                show(progress.read([run.name for future, run in futures.items() if future.running()]))
                if stop.is_asked:
                    pool.shutdown(wait=False, cancel_futures=True)
                time.sleep(_POLL_SECONDS)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop.ask(patience_seconds=0.0)  # lets the threads return at once
            raise
    if stop.is_asked:
        raise KeyboardInterrupt
    if failures:
        text = "\n".join(f"  {name}: {_last_line(error)}" for name, error in failures.items())
        raise StageError(f"{len(failures)} run(s) failed; start the comparison again to continue:\n{text}")


def is_done(run: PlannedRun) -> bool:
    """Return whether the planned run, and not only one of its name, has finished with all compared metrics.

    A run whose evaluation failed is not done: started again, it trains no step and evaluates.
    """
    summary = summary_of(run.config, run.identity)
    return summary is not None and all(isinstance(summary.get(metric), float) for metric in METRIC_TITLES)


def measure_on_cluster(base: RunConfig, arm_names: Sequence[str], device: Device) -> dict[str, StepCost]:
    """Measure the cost of a step of every arm on a node that a trainer could use; see `step_cost.py`.

    Raises:
        ConfigError: no node has CPUs for the trainer's threads.
    """
    reserved = {"CPU": float(base.training.torch_threads), "GPU": float(device == "cuda")}
    _num_inline(reserved)
    task = _measure_task.options(num_cpus=reserved["CPU"], num_gpus=reserved["GPU"])
    costs: dict[str, StepCost] = ray.get(task.remote(config_to_dict(base), list(arm_names), device))
    return costs


@ray.remote(max_retries=2)
def _measure_task(config: dict[str, Any], arm_names: list[str], device: str) -> dict[str, StepCost]:
    base = config_from_dict(config)
    arms = [get_arm(name) for name in arm_names]
    return measure_step_costs(base, arms, open_dataset(base.data), device=torch.device(device))


def _work_with_workers(run: PlannedRun, stop: StopRequest, *, num_sharing: int) -> None:
    launch(run.config, Watchers(), num_sharing=num_sharing, stop=stop, planned=run.identity)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
