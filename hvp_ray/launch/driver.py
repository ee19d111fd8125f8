"""Launch a run on Ray: view workers made by the driver, trainers by Ray Train, a board between them.

The driver decides (renderer, device, number of workers), checks that everything fits before anything is started,
and watches. Ray Train starts the trainers again after a failure; they go on from our newest checkpoint.
"""

import contextlib
import dataclasses
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hvp_ray.config import RendererName, RunConfig, config_from_dict, config_to_dict
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.data.inventory import DataInventory
from hvp_ray.distributed.world import current_world
from hvp_ray.errors import ConfigError, HvpRayError, StageError, TrainingError, first_line
from hvp_ray.evaluation.report import check_knn_labels
from hvp_ray.evaluation.snapshot import SnapshotKnn
from hvp_ray.files import delete_folder, place_in
from hvp_ray.identity import Identity
from hvp_ray.launch.board import BoardContent, BoardLogHandler, RunBoardActor
from hvp_ray.launch.placement import Placement, lacks_a_label, place_in_part
from hvp_ray.launch.stop import RayProcesses, StoppedError, StopRequest, stop_on_signals
from hvp_ray.logs import set_up_logging
from hvp_ray.runs.after_training import forgive_death
from hvp_ray.runs.intensity_check import check_intensities
from hvp_ray.runs.job import RankServices, RunJob
from hvp_ray.runs.prepare import check_before_start, prepare_run, with_absolute_paths
from hvp_ray.runs.progress import Progress
from hvp_ray.runs.rank import train_rank
from hvp_ray.stream.batches import BatchStream, RequestOf
from hvp_ray.stream.capacity import (
    decide_look_ahead,
    look_ahead_bytes,
    plan_local_ray,
    spilled_bytes,
    store_for_look_ahead,
    this_machine,
)
from hvp_ray.stream.connect import connect_ray, end_ray, is_ray_lost
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.metrics import TRAINER_METRICS, MetricsPublisher
from hvp_ray.stream.pool import ViewWorkerPool, start_pool
from hvp_ray.stream.sizing import mean_decoded_bytes
from hvp_ray.stream.view_stream import ViewStream
from hvp_ray.stream.view_worker import start_finishers

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_END_SECONDS = 2.0
_KILL_SECONDS = 20.0
_CLUSTER_NUMBERS_SECONDS = 10.0
_JOIN_SECONDS = 60.0
_OTHER_LABEL_SECONDS = 10.0
_SILENCE_SECONDS = 120.0
_NO_CHECKPOINT = "stopped before the trainers had written a checkpoint; the last periodic one stands"
_TRAINED = "stopped in the evaluation; training is done, and starting the run again with its name evaluates it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """What is known once everything is decided and nothing has started."""

    run_name: str
    location: str
    """The run's folder, path or URI."""
    joined_cluster: bool
    num_trainers: int
    num_view_workers: int
    num_finishers: int
    """View finishers of all trainers; 0: view workers render."""
    renderer: RendererName
    device: str
    look_ahead_bytes: int
    inventory: DataInventory


@dataclass(frozen=True, kw_only=True, slots=True)
class Watchers:
    """Where the driver shows what happens; called in the driver's main thread."""

    announce: Callable[[Announcement], None]
    show_progress: Callable[[Progress], None]
    show_message: Callable[[str], None]


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
        watchers: where the driver shows what happens.
        num_sharing: how many runs share the cluster, this one included; it takes an equal part of everything.
        stop: another thread may ask by it; SIGTERM and Ctrl-C do if this is the main thread.
        planned: see `prepare_run`.

    Raises:
        HvpRayError: with a sentence for the user; nothing that was committed is lost.
    """
    stop = stop or StopRequest()
    config = with_absolute_paths(config)
    dataset = check_before_start(config)
    for remark in (check_intensities(config.data, dataset), *check_knn_labels(config, dataset)):
        if remark is not None:
            watchers.show_message(remark)
    decoded_bytes = decoded_bytes_of(config, dataset)
    is_ours = not ray.is_initialized()
    joined = connect_ray(lambda: plan_local_ray(config, this_machine(), decoded_bytes))
    try:
        placement = _place(config, num_sharing, may_wait=joined, stop=stop, say=watchers.show_message)
        wanted_ahead = dataclasses.replace(config.cluster, batches_in_flight="auto")
        config, store_bytes = _prefetch(config, placement, decoded_bytes, num_sharing)
        ahead, wanted = (
            config.cluster.num_batches_in_flight(),
            wanted_ahead.num_batches_in_flight(placement.num_view_workers),
        )
        if ahead < wanted - 2:
            watchers.show_message(
                f"view workers will idle: each trainer asks for {ahead} batch(es) ahead, one for each worker at a time, and "
                f"{wanted} would keep its share of the {placement.num_view_workers} view worker(s) busy; raise "
                f"cluster.batches_in_flight, or where it is auto the object stores ({store_bytes / 2**20:.0f} MiB)"
            )
        job = prepare_run(
            config, renderer=placement.renderer, device=placement.device, planned=planned, dataset=dataset
        )
        assert job.inventory is not None
        watchers.announce(
            Announcement(
                run_name=job.run_name,
                location=job.location,
                joined_cluster=joined,
                num_trainers=config.cluster.num_trainers,
                num_view_workers=placement.num_view_workers,
                num_finishers=config.cluster.num_trainers * config.cluster.num_finishers,
                renderer=placement.renderer,
                device=placement.device,
                look_ahead_bytes=look_ahead_bytes(config, decoded_bytes),
                inventory=job.inventory,
            )
        )
        return _run(job, placement, watchers, stop), job
    except RayError as error:
        raise StageError(
            f"Ray failed during the run: {first_line(error)}; start the run again with its name to continue from the last "
            f"checkpoint"
        ) from error
    finally:
        if is_ours:
            end_ray(threads_have_ended=not any(isinstance(thread, _FitThread) for thread in threading.enumerate()))


def decoded_bytes_of(config: RunConfig, dataset: Dataset | None = None) -> float:
    """Return the mean bytes of a decoded image if decoded pixels are shipped, else 0; open the data if it is not open."""
    if config.cluster.ship != "pixels":
        return 0.0
    return mean_decoded_bytes(dataset or open_dataset(config.data), config.data)


def num_side_by_side(config: RunConfig, limit: int) -> int:
    """Return how many runs like this one, at most `limit`, fit the connected cluster, each in an equal part of it.

    Raises:
        ConfigError: not one does.
    """
    if config.cluster.placement == "labels":
        return 1  # nodes may be missing: several runs could each get a part of what they need, and wait for ever
    decoded_bytes = decoded_bytes_of(config)
    for num_sharing in range(limit, 1, -1):
        try:
            _prefetch(config, _place_now(config, num_sharing), decoded_bytes, num_sharing)
        except ConfigError:
            continue
        return num_sharing
    _prefetch(config, _place_now(config, 1), decoded_bytes, 1)
    return 1


def _place_now(config: RunConfig, num_sharing: int) -> Placement:
    """Fit the run to the connected cluster, or to its part of it if several runs share the cluster.

    Raises:
        ConfigError: the cluster, or the part, has too little.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return place_in_part(
        config, ray.cluster_resources(), ray.available_resources(), nodes=nodes, num_sharing=num_sharing
    )


def _prefetch(
    config: RunConfig, placement: Placement, decoded_bytes: float, num_sharing: int
) -> tuple[RunConfig, float]:
    """Return the config with `cluster.batches_in_flight` as a number, and the bytes of object store of this run.

    Raises:
        ConfigError: the batches do not fit the object store.
    """
    needs = placement.trainer_resources, placement.view_worker_resources
    store_bytes = store_for_look_ahead(config, ray.nodes(), *needs) / num_sharing
    return decide_look_ahead(config, placement.num_view_workers, store_bytes, decoded_bytes), store_bytes


def _place(
    config: RunConfig, num_sharing: int, *, may_wait: bool, stop: StopRequest, say: Callable[[str], None]
) -> Placement:
    """Fit the run to the cluster; nodes of a cluster that was joined may be on their way, and are waited for a while."""
    started = time.monotonic()
    told = False
    while True:
        waited = time.monotonic() - started
        try:
            placement = _place_now(config, num_sharing)
            total = ray.cluster_resources()
            if not may_wait or waited > _OTHER_LABEL_SECONDS or not lacks_a_label(config, total):
                return placement
            reason = "nodes of one label are there, and none of the other"
        except ConfigError as error:
            if not may_wait or waited > _JOIN_SECONDS:
                raise
            reason = str(error)
        if not told:
            say(f"waiting for nodes to join, {_JOIN_SECONDS:.0f} s at most: {reason}")
            told = True
        time.sleep(1.0)
        if stop.is_asked:
            raise StoppedError("stopped while waiting for nodes to join")


def _run(job: RunJob, placement: Placement, watchers: Watchers, stop: StopRequest) -> dict[str, Any]:
    with contextlib.ExitStack() as ends:
        # On this node, which the run cannot outlive anyway.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = RunBoardActor.options(scheduling_strategy=here).remote()
        knn = None
        if job.config.tracking.knn_every_epochs:
            options = {"num_gpus": job.config.cluster.gpus_for_knn}
            knn = _KnnActor.options(**options).remote(
                config_to_dict(job.config),
                gpu=options["num_gpus"] > 0,
                fingerprint=job.data_fingerprint,
                test_data=job.test_data,
            )
            ends.callback(_unless_lost, ray.kill, knn)
        pool = start_pool(
            job.config,
            placement.renderer,
            placement.num_view_workers,
            placement.view_worker_resources,
            data_fingerprint=job.data_fingerprint,
            must_stop=lambda: stop.is_asked,
        )
        ends.callback(_unless_lost, pool.close)
        num_trainers, least = job.config.cluster.num_trainers, job.config.cluster.min_trainers
        # A fixed number of trainers waits for a lost node; an elastic one asks once for all, then takes what there is.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300" if least is None else "60")
        ray_train = place_in(job.location, "ray_train")
        trainer = TorchTrainer(
            _trainer_main,
            train_loop_config={
                "job": job,
                "pool": pool,
                "board": board,
                "knn": knn,
                "device": placement.device,
                "gpu_share": placement.trainer_resources.get("GPU", 1.0),
                "spilled_before": spilled_bytes(),
            },
            torch_config=TorchConfig(timeout_s=1800),
            scaling_config=ScalingConfig(
                num_workers=num_trainers if least is None else (least, num_trainers),
                elastic_resize_monitor_interval_s=job.config.cluster.resize_check_seconds,
                use_gpu=placement.device == "cuda",
                resources_per_worker=placement.trainer_resources,
            ),
            run_config=ray.train.RunConfig(
                # A name of its own for every attempt: resuming is our business, not that of Ray Train's state.
                name=f"{job.run_name}-{uuid.uuid4().hex[:8]}",
                storage_path=ray_train,
                failure_config=FailureConfig(max_failures=job.config.cluster.max_trainer_failures),
                callbacks=[_ControllerOnBoard(board)],
            ),
        )
        fit = _FitThread(trainer)
        fit.start()
        try:
            return _watch(board, fit, watchers, placement, stop)
        finally:
            fit.end(board)
            if not fit.is_alive():
                delete_folder(ray_train)
            if stop.is_asked:
                forgive_death(job.location)


def _unless_lost(action: Callable[..., None], *arguments: object) -> None:
    """Call Ray to clean up, unless it would wait for processes that are gone."""
    if not is_ray_lost():
        action(*arguments)


class _ControllerOnBoard(ControllerCallback):
    """Runs in Ray Train's controller, and posts its handle, so that the driver can end it."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        self._board.post_controller.remote(ray.get_runtime_context().current_actor)


class _FitThread(threading.Thread):
    """Runs Ray Train, whose `fit` has no timeout and cannot be interrupted."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: Exception | None = None

    def run(self) -> None:
        """Train; keep the error for the driver's thread."""
        try:
            self._trainer.fit()
        except Exception as error:  # noqa: BLE001 (raised again in the driver's thread)
            self.error = error

    def end(self, board: Any) -> None:
        """Wait until `fit` has returned; make it return if the trainers do not end by themselves.

        While a thread calls Ray, `ray.shutdown()` can crash the process.
        """
        self.join(timeout=_END_SECONDS)
        if not self.is_alive() or is_ray_lost():
            return
        try:
            controller = ray.get(board.read_controller.remote(), timeout=_KILL_SECONDS)
            if controller is not None:
                ray.kill(controller)  # its trainers end with it
        except RayError as error:
            logger.warning("Ray Train's controller could not be ended: %s", first_line(error))
        self.join(timeout=_KILL_SECONDS)


class _BoardReader:
    """Reads the board, and returns in time if Ray does not answer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._answer: Any = None

    def read(self, timeout_seconds: float) -> BoardContent | None:
        """Return what is on the board; None: no answer yet."""
        self._answer = self._answer or self._board.read.remote()
        ready, _ = ray.wait([self._answer], timeout=timeout_seconds)
        if not ready:
            return None
        answer, self._answer = self._answer, None
        content: BoardContent = ray.get(answer)
        return content


def _watch(board: Any, fit: _FitThread, watchers: Watchers, placement: Placement, stop: StopRequest) -> dict[str, Any]:
    """Show what the board says until the trainers have ended."""
    silence = _Silence(placement)
    reader, ray_processes = _BoardReader(board), RayProcesses(stop)
    shown: Progress | None = None
    content: BoardContent | None = None
    stop_was_sent = is_trained = False
    with stop_on_signals(stop):
        while True:
            ended = not fit.is_alive()
            if stop.is_asked and not stop_was_sent:
                watchers.show_message("asked to stop: the trainers write a checkpoint after the step at hand")
                board.request_stop.remote()
                stop_was_sent = True
            try:
                content = reader.read(_POLL_SECONDS)
            except RayError:  # the board lives on this node, and ends with Ray
                fit.join(timeout=_END_SECONDS)
                ray_processes.check(patience_seconds=0.0)
                raise
            if content is not None:
                is_trained = content.is_trained
                for message in content.messages:
                    watchers.show_message(message)
                if content.progress is not None and content.progress != shown:
                    shown = content.progress
                    watchers.show_progress(shown)
                    silence.end(is_last=shown.steps_done >= shown.num_steps)
                if content.fatal is not None:
                    raise TrainingError(content.fatal)
                if ended:
                    break
            ray_processes.check()
            silence.mention(watchers.show_message)
            if stop.is_overdue:
                raise StoppedError(_TRAINED if is_trained else _NO_CHECKPOINT)
            fit.join(timeout=_POLL_SECONDS)
    if content.summary is not None:
        return content.summary
    if stop.is_asked:
        behind = "stopped behind a checkpoint; start the run again with its name to go on"
        raise StoppedError(_TRAINED if is_trained else behind)
    if fit.error is not None:
        raise StageError(
            f"the trainers failed more than cluster.max_trainer_failures times; start the run again with its name to go on "
            f"from the last checkpoint. The last failure:\n{fit.error}"
        ) from fit.error
    raise StageError("the trainers ended without a summary; see Ray's logs")


class _Silence:
    """Says after a while without a step what may be missing: Ray waits for room without a word."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._since = time.monotonic()
        self._patience_seconds = _SILENCE_SECONDS

    def end(self, *, is_last: bool) -> None:
        """Note that a step was done."""
        self._since = time.monotonic()
        self._patience_seconds = float("inf") if is_last else _SILENCE_SECONDS

    def mention(self, say: Callable[[str], None]) -> None:
        """Speak where it is time, and then less and less often."""
        seconds = time.monotonic() - self._since
        if seconds < self._patience_seconds:
            return
        self._patience_seconds = 2.0 * seconds
        free = {name: amount for name, amount in ray.available_resources().items() if not name.startswith("node:")}
        for name in ("memory", "object_store_memory"):
            free.pop(name, None)
        say(
            f"no step was done for {seconds:.0f} s. If trainers wait for room (`ray status`): each needs "
            f"{self._placement.trainer_resources}, free are {free}"
        )


def _trainer_main(settings: dict[str, Any]) -> None:
    """Run one trainer, inside a worker of Ray Train."""
    job: RunJob = settings["job"]
    pool: ViewWorkerPool = settings["pool"]
    board = settings["board"]
    config = job.config
    world = current_world()
    set_up_logging(run=job.run_name, origin=f"rank={world.rank}")
    torch.set_num_threads(config.training.torch_threads)
    cv2.setNumThreads(1)
    device = ray.train.torch.get_device() if settings["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda" and settings["gpu_share"] < 1.0:
        torch.cuda.set_per_process_memory_fraction(settings["gpu_share"], device)  # the rest is the neighbours'
    publisher = MetricsPublisher(TRAINER_METRICS, {"run": job.run_name, "rank": str(world.rank)})

    def open_stream(request_of: RequestOf, first_step: int, end_step: int) -> BatchStream:
        logger.info("steps %d to %d, views from %d workers", first_step, end_step, len(pool.workers))
        stream = ViewStream(
            pool.workers,
            request_of,
            range(first_step, end_step),
            cluster=config.cluster,
            hand_over=hand_over,
            world=world,
            finishers=finishers,
        )
        publisher.watch(stream.numbers)
        return stream

    def cluster_facts() -> dict[str, float]:
        return {
            "spilled_bytes": spilled_bytes() - settings["spilled_before"],
            "num_worker_restarts": pool.num_restarts(),
        }

    def cluster_numbers() -> dict[str, float]:
        facts = cluster_facts()
        return {
            "hvp_ray_spilled_bytes": float(facts["spilled_bytes"]),
            "hvp_ray_worker_restarts": float(facts["num_worker_restarts"]),
        }

    handler = BoardLogHandler(board, prefix="" if world.num_ranks == 1 else f"trainer {world.rank}: ")
    logging.getLogger("hvp_ray").addHandler(handler)
    try:
        hand_over = CopyToDevice(device)
        finishers = start_finishers(config, rank=world.rank)
        if ray.get(board.read_fatal.remote()) is not None:
            return  # another rank met an error that starting again does not mend; the driver knows
        if world.rank == 0:
            publisher.watch(cluster_numbers, every_seconds=_CLUSTER_NUMBERS_SECONDS)
        services = RankServices(
            open_stream=open_stream,
            report_progress=_Reporter(board),
            ask_knn=lambda snapshot: _RayAnswer(settings["knn"].evaluate.remote(snapshot)),
            cluster_facts=cluster_facts,
            watch_numbers=publisher.watch,
            is_stop_asked=lambda: bool(ray.get(board.post_evaluation.remote())),
        )
        summary = train_rank(job, world, device, services)
    except HvpRayError as error:
        # Starting again would fail in the same way, so the driver is told to give up.
        error.add_note(f"rank {world.rank} of {world.num_ranks}, run {job.run_name}")
        ray.get(board.post_fatal.remote("\n".join([str(error), *error.__notes__])))
        if world.num_ranks == 1:
            return
        raise  # the other ranks wait in a collective; this tears them out of it
    finally:
        publisher.close()
        logging.getLogger("hvp_ray").removeHandler(handler)
        handler.close()
    if summary is not None:
        ray.get(board.post_summary.remote(summary))


class _SnapshotKnnActor:
    """Evaluates snapshots in a process of its own, made by the driver so that it outlives a restart of the trainers."""

    def __init__(self, config: dict[str, Any], *, gpu: bool, fingerprint: str, test_data: str) -> None:
        torch.set_num_threads(1)
        device = torch.device("cuda" if gpu else "cpu")
        self._knn = SnapshotKnn(config_from_dict(config), device, fingerprint=fingerprint, test_data=test_data)

    def evaluate(self, snapshot: bytes) -> dict[str, float]:
        """Return the accuracies of one snapshot."""
        return self._knn.evaluate(snapshot)


_KnnActor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=2)(_SnapshotKnnActor)


class _RayAnswer:
    """An answer of `_KnnActor`; implements `online_knn.KnnAnswer`."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def is_ready(self) -> bool:
        return bool(ray.wait([self._reference], timeout=0)[0])

    def values(self) -> dict[str, float]:
        try:
            values: dict[str, float] = ray.get(self._reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # the evaluation's own error, without Ray's traceback of the actor
        return values


class _Reporter:
    """Posts progress without waiting; the answer to one post is read at the next."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._answer: Any = None

    def __call__(self, progress: Progress) -> bool:
        stop = False
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if not ready:
                return False
            stop = ray.get(self._answer)
        self._answer = self._board.post_progress.remote(progress)
        return stop
