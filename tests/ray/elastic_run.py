"""Run elastically on four nodes of one machine, lose a node, add a node, stop, and print a line of JSON.

python -m tests.ray.elastic_run FOLDER
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import ray
from ray.cluster_utils import Cluster

from hvp_ray.launch.stop import StoppedError, StopRequest
from tests.helpers import tiny_config
from tests.ray.runs import attempts, launch_quietly, recorded_steps
from tests.waiting import PATIENCE_SECONDS, wait_until

CHECKPOINT_EVERY = 20


def elastic_config(output: Path) -> Any:
    """Two trainers at most, one at least, and more steps than are ever done: `main` stops the run.

    Random views and a low learning rate keep rounding errors small, so the loss of a step identifies its images.
    """
    return tiny_config(
        str(output),
        run={"name": "elastic"},
        training={"num_steps": 100_000, "checkpoint_every_steps": CHECKPOINT_EVERY, "images_per_step": 64},
        selection={"rule": "first"},
        optimizer={"learning_rate_per_256": 1e-7},
        cluster={"num_trainers": 2, "min_trainers": 1, "resize_check_seconds": 2.0, "num_view_workers": 1},
    )


def main(output: Path) -> None:
    """Run, lose a trainer, add a trainer, stop, and print the outcome."""
    run_dir = output / "elastic"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1, resources={"view": 1}, object_store_memory=100 * 2**20)
    trainers = [
        cluster.add_node(num_cpus=1, resources={"trainer": 1}, object_store_memory=100 * 2**20) for _ in range(2)
    ]
    ray.init(address=cluster.address, log_to_driver=False)
    stop = StopRequest()
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            launch_quietly(elastic_config(output), stop=stop)
        except StoppedError:
            result["stopped"] = True
        except BaseException as error:
            result["error"] = repr(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait_for(condition: Callable[[], bool], what: str) -> None:
        wait_until(lambda: condition() or not thread.is_alive(), what, pause=0.1)
        if not condition():
            raise RuntimeError(f"the run ended before {what}: {result}, {attempts(run_dir)}")

    def at_step(step: int) -> Callable[[], bool]:
        return lambda: (recorded_steps(run_dir) or [0])[-1] >= step

    wait_for(at_step(50), "step 50 of two trainers")
    cluster.remove_node(trainers[1], allow_graceful=False)
    wait_for(lambda: len(attempts(run_dir)) == 2, "the start of the remaining trainer")
    wait_for(at_step(attempts(run_dir)[1]["step"] + 30), "steps of the remaining trainer")
    cluster.add_node(num_cpus=1, resources={"trainer": 1}, object_store_memory=100 * 2**20)
    wait_for(lambda: len(attempts(run_dir)) == 3, "the start of two trainers")
    wait_for(at_step(attempts(run_dir)[2]["step"] + CHECKPOINT_EVERY), "steps of two trainers")
    stop.ask(patience_seconds=PATIENCE_SECONDS)
    thread.join()
    print(json.dumps({"attempts": attempts(run_dir), **result}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
