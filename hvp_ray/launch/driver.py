"""The driver of a run on Ray: check, resolve, start view workers and trainers, watch, and end everything.

Nothing starts before everything is checked. View workers belong to the driver, so they survive a restart of the trainers.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hvp_ray.config import ClusterConfig, RunConfig
from hvp_ray.costs.prefetch import batches_for_workers, prefetch_bytes, step_bytes
from hvp_ray.data.dataset import Dataset
from hvp_ray.errors import ConfigError, StageError, first_line
from hvp_ray.evaluation.report import check_knn_labels
from hvp_ray.identity import Identity
from hvp_ray.launch.board import RunBoardActor
from hvp_ray.launch.knn_actor import start_knn
from hvp_ray.launch.local_cluster import plan_local_ray
from hvp_ray.launch.placement import ClusterState, PrefetchError, lacks_a_label, resolve_on_cluster
from hvp_ray.launch.pool_supervisor import PoolSupervisor
from hvp_ray.launch.ray_train import TrainersThread
from hvp_ray.launch.stop import RayProcesses, StoppedError, StopRequest, stop_on_signals
from hvp_ray.launch.trainer_setup import TrainerSetup
from hvp_ray.launch.watch import Announcement, Watchers, stopped, watch
from hvp_ray.resolved_run import ResolvedRun
from hvp_ray.runs.after_training import forgive_death
from hvp_ray.runs.channel_statistics import describe_channels
from hvp_ray.runs.check import check_before_start, describe_initial_weights
from hvp_ray.runs.intensity_check import check_intensities
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.location import with_absolute_paths
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.stream.connect import connect_ray, end_ray, is_ray_lost
from hvp_ray.stream.machine import this_machine
from hvp_ray.stream.pool import ViewWorkerPool, start_pool
from hvp_ray.stream.spilling import spilled_bytes

_JOIN_SECONDS = 60.0
_OTHER_LABEL_SECONDS = 10.0


def launch(
    config: RunConfig,
    watchers: Watchers,
    *,
    num_sharing: int = 1,
    stop: StopRequest | None = None,
    planned: Identity | None = None,
) -> tuple[dict[str, Any], RunJob]:
    """Run to the end; return the summary and the job.

    Args:
        config: the run.
        watchers: functions that show what happens.
        num_sharing: runs that share the cluster, this one included. Each takes an equal part.
        stop: request that another thread may set. SIGTERM and Ctrl-C set it if this is the main thread.
        planned: see `prepare_run`.

    Raises:
        HvpRayError: the message tells the user what to do. Everything that was committed stays.
    """
    stop = stop or StopRequest()
    config = with_absolute_paths(config)
    dataset = check_before_start(config)
    remarks = (
        *check_intensities(config.data, dataset),
        *describe_channels(config),
        *check_knn_labels(config, dataset),
        *describe_initial_weights(config),
    )
    for remark in remarks:
        watchers.show_message(remark)
    bytes_per_step = step_bytes(config, dataset)
    is_ours = not ray.is_initialized()
    joined = connect_ray(lambda: plan_local_ray(config.cluster, this_machine(), bytes_per_step))
    try:

        def resolve() -> ResolvedRun:
            return resolve_on_cluster(config, read_cluster(num_sharing), bytes_per_step)

        resolved = _wait_for_nodes(resolve, config.cluster, stop, watchers.show_message) if joined else resolve()
        _show_idle_workers(config, resolved, watchers.show_message)
        job = prepare_run(config, resolved, planned=planned, dataset=dataset)
        in_flight = prefetch_bytes(resolved.batches_in_flight, bytes_per_step)
        watchers.announce(Announcement(job=job, joined_cluster=joined, prefetch_bytes=in_flight))
        return _run(job, watchers, stop, bytes_per_step=bytes_per_step, num_sharing=num_sharing), job
    except RayError as error:
        raise StageError(
            f"Ray failed during the run: {first_line(error)}; start the run again with its name to continue from the last "
            f"checkpoint"
        ) from error
    finally:
        if is_ours:
            of_ray = (TrainersThread, PoolSupervisor)
            end_ray(threads_have_ended=not any(isinstance(thread, of_ray) for thread in threading.enumerate()))


def num_side_by_side(config: RunConfig, dataset: Dataset, limit: int) -> int:
    """Return how many such runs, at most `limit`, fit the connected cluster, each in an equal part of it.

    Raises:
        ConfigError: not even one fits.
    """
    if config.cluster.placement == "labels":
        return 1  # nodes may be missing: several runs could each get a part of what they need, and wait forever
    bytes_per_step = step_bytes(config, dataset)
    for num_sharing in range(limit, 1, -1):
        with contextlib.suppress(ConfigError):
            resolve_on_cluster(config, read_cluster(num_sharing), bytes_per_step)
            return num_sharing
    resolve_on_cluster(config, read_cluster(), bytes_per_step)
    return 1


def read_cluster(num_sharing: int = 1) -> ClusterState:
    """Return the state of the connected cluster."""
    return ClusterState(
        total=ray.cluster_resources(),
        free=ray.available_resources(),
        nodes=[node["Resources"] for node in ray.nodes() if node["Alive"]],
        num_sharing=num_sharing,
    )


def _wait_for_nodes(
    resolve: Callable[[], ResolvedRun], cluster: ClusterConfig, stop: StopRequest, show: Callable[[str], None]
) -> ResolvedRun:
    """Resolve the run on a cluster that nodes may be about to join: retry for a while if it is too small."""
    started = time.monotonic()
    was_shown = False
    while True:
        waited = time.monotonic() - started
        try:
            resolved = resolve()
            if waited > _OTHER_LABEL_SECONDS or not lacks_a_label(cluster, ray.cluster_resources()):
                return resolved
            reason = "only nodes of one label have joined"
        except PrefetchError as error:
            # A node of the missing label may bring a larger object store.
            if waited > _OTHER_LABEL_SECONDS or not lacks_a_label(cluster, ray.cluster_resources()):
                raise
            reason = str(error)
        except ConfigError as error:
            if waited > _JOIN_SECONDS:
                raise
            reason = str(error)
        if not was_shown:
            show(f"waiting for nodes to join, {_JOIN_SECONDS:.0f} s at most: {reason}")
            was_shown = True
        time.sleep(1.0)
        if stop.is_asked:
            raise StoppedError("stopped while waiting for nodes to join")


def _show_idle_workers(config: RunConfig, resolved: ResolvedRun, show: Callable[[str], None]) -> None:
    wanted = batches_for_workers(config.cluster, resolved.num_view_workers)
    if resolved.batches_in_flight < wanted - 2:
        show(
            f"view workers will idle: each trainer prefetches {resolved.batches_in_flight} batch(es), one per worker at a "
            f"time, and {wanted} would keep its share of the {resolved.num_view_workers} view worker(s) busy; raise "
            f"cluster.batches_in_flight, or the size of the object stores if it is auto"
        )


def _run(
    job: RunJob, watchers: Watchers, stop: StopRequest, *, bytes_per_step: int, num_sharing: int
) -> dict[str, Any]:
    """Start the processes of a run, watch them, and end them."""
    with contextlib.ExitStack() as ends:
        # The board runs on the driver's node, because the run ends with this node anyway.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = RunBoardActor.options(scheduling_strategy=here).remote()
        knn = None
        if job.config.tracking.knn_every_epochs:
            knn = start_knn(job)
            ends.callback(_unless_lost, ray.kill, knn)
        # Trainers take longest to start. They wait for the roster, which the supervisor publishes once a worker is up.
        trainers = TrainersThread(TrainerSetup(job=job, board=board, knn=knn, spilled_before=spilled_bytes()))
        trainers.start()
        try:
            with stop_on_signals(stop):
                pool = _start_pool(job, stop)
                ends.callback(_unless_lost, pool.close)
                supervisor = PoolSupervisor(pool, board, job, bytes_per_step=bytes_per_step, num_sharing=num_sharing)
                supervisor.start()
                ends.callback(supervisor.end)
                return watch(board, trainers, job, watchers, stop)
        finally:
            trainers.end()
            if stop.is_asked:
                forgive_death(job.location)


def _start_pool(job: RunJob, stop: StopRequest) -> ViewWorkerPool:
    processes = RayProcesses(stop)
    try:
        return start_pool(
            job.config,
            job.resolved.renderer,
            job.resolved.num_view_workers,
            job.resolved.view_worker_resources,
            data_fingerprint=job.data_fingerprint,
            must_stop=lambda: stop.is_asked or is_ray_lost(),
        )
    except StageError as error:
        processes.check(patience_seconds=0.0)
        raise stopped(str(error), job) from error


def _unless_lost(action: Callable[..., None], *arguments: object) -> None:
    """Call Ray to clean up, unless Ray is lost and the call would block."""
    if not is_ray_lost():
        action(*arguments)
