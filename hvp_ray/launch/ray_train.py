"""Ray Train starts the trainers, and restarts them after a failure. They continue from our newest checkpoint."""

import logging
import os
import threading
import time
import uuid
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback

from hvp_ray.errors import first_line
from hvp_ray.files import delete_folder, place_in
from hvp_ray.launch.board import Unread
from hvp_ray.launch.trainer_setup import TrainerSetup
from hvp_ray.stream.connect import is_ray_lost

logger = logging.getLogger(__name__)

END_SECONDS = 2.0
"""Trainers that have ended let `fit` return within this time."""
_KILL_SECONDS = 20.0
_POLL_SECONDS = 0.2


def _run_trainer(settings: dict[str, Any]) -> None:
    from hvp_ray.launch.trainer import trainer_main  # here, because the controller loads this module too

    trainer_main(settings["setup"])


class _PostController(ControllerCallback):
    """Runs in Ray Train's controller and posts its handle, so that the driver can kill it."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_controller_start(self, train_run_context: Any) -> None:
        self._board.post.remote(controller=Unread(ray.get_runtime_context().current_actor))


class TrainersThread(threading.Thread):
    """Runs Ray Train, whose `fit` has no timeout and cannot be interrupted."""

    def __init__(self, setup: TrainerSetup) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._board = setup.board
        self._folder = place_in(setup.job.location, "ray_train")
        self._trainer = _build_trainer(setup, self._folder)
        self.error: Exception | None = None

    def run(self) -> None:
        """Train; keep the error for the driver's thread."""
        try:
            self._trainer.fit()
        except Exception as error:  # noqa: BLE001 (re-raised in the driver's thread)
            self.error = error

    def end(self) -> None:
        """Wait until `fit` has returned. Kill the controller if the trainers do not end by themselves.

        `ray.shutdown()` can crash the process while a thread calls Ray.
        """
        if not is_ray_lost():
            self._board.post_fatal.remote("the run has ended")  # trainers that still start end by themselves
        self.join(timeout=END_SECONDS)
        try:
            controller = self._wait_for_controller()
            if controller is not None:
                ray.kill(controller)  # its trainers end with it
        except RayError as error:
            logger.warning("Ray Train's controller could not be ended: %s", first_line(error))
        self.join(timeout=0.0 if is_ray_lost() else _KILL_SECONDS)
        if not self.is_alive():
            delete_folder(self._folder)

    def _wait_for_controller(self) -> Any:
        """Return the handle of the controller, which may still start. None: `fit` has returned, or no controller came."""
        deadline = time.monotonic() + _KILL_SECONDS
        while self.is_alive() and not is_ray_lost() and time.monotonic() < deadline:
            controller: Unread[Any] | None = ray.get(self._board.read.remote(), timeout=_KILL_SECONDS).controller
            if controller is not None:
                return controller.read()
            self.join(timeout=_POLL_SECONDS)
        return None


def _build_trainer(setup: TrainerSetup, folder: str) -> TorchTrainer:
    job = setup.job
    cluster, resolved, least = job.config.cluster, job.resolved, job.config.cluster.min_trainers
    # A fixed number of trainers waits for a lost node. An elastic run takes what there is after one timeout.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300" if least is None else "60")
    return TorchTrainer(
        _run_trainer,
        train_loop_config={"setup": setup},
        torch_config=TorchConfig(timeout_s=1800),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_trainers if least is None else (least, cluster.num_trainers),
            elastic_resize_monitor_interval_s=cluster.resize_check_seconds,
            use_gpu=resolved.device == "cuda",
            resources_per_worker=dict(resolved.trainer_resources),
        ),
        run_config=ray.train.RunConfig(
            # A new name for every attempt: we resume from our own checkpoints, not from Ray Train's state.
            name=f"{job.run_name}-{uuid.uuid4().hex[:8]}",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=cluster.max_trainer_failures),
            callbacks=[_PostController(setup.board)],
        ),
    )
