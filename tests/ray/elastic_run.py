"""A program: an elastic run on four nodes of one machine, of which one is lost and one comes. Prints a line of JSON.

python -m tests.ray.elastic_run FOLDER
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import ray
from ray.cluster_utils import Cluster

from tests.helpers import tiny_config
from tests.ray.runs import attempts, launch_quietly, recorded_steps

NUM_STEPS = 300


def elastic_config(output: Path) -> Any:
    """Two trainers at most, one at least, checkpoints every 20 steps.

    Steps are long enough for Ray to find the new node before one trainer has done them all. Random views and a low learning
    rate, so that sums in another order do not grow: losses tell the images of each step.
    """
    return tiny_config(
        str(output),
        run={"name": "elastic"},
        training={"num_steps": NUM_STEPS, "checkpoint_every_steps": 20, "images_per_step": 64},
        selection={"rule": "first"},
        optimizer={"learning_rate_per_256": 1e-5},
        cluster={"num_trainers": 2, "min_trainers": 1, "resize_check_seconds": 2.0, "num_view_workers": 1},
    )


def main(output: Path) -> None:
    """See the module."""
    run_dir = output / "elastic"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1, resources={"view": 1}, object_store_memory=100 * 2**20)
    trainers = [
        cluster.add_node(num_cpus=1, resources={"trainer": 1}, object_store_memory=100 * 2**20) for _ in range(2)
    ]
    ray.init(address=cluster.address, log_to_driver=False)
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["summary"] = launch_quietly(elastic_config(output))
        except BaseException as error:
            result["error"] = repr(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait_until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 900
        while not condition():
            if not thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"waited for {what}: {result or recorded_steps(run_dir)[-1:]}, {attempts(run_dir)}")
            time.sleep(0.1)

    def at_step(step: int) -> Callable[[], bool]:
        return lambda: (recorded_steps(run_dir) or [0])[-1] >= step

    wait_until(at_step(50), "step 50 of two trainers")
    cluster.remove_node(trainers[1], allow_graceful=False)
    wait_until(lambda: len(attempts(run_dir)) == 2, "the trainer that is left")
    wait_until(at_step(attempts(run_dir)[1]["step"] + 30), "steps of the trainer that is left")
    cluster.add_node(num_cpus=1, resources={"trainer": 1}, object_store_memory=100 * 2**20)
    thread.join()
    print(json.dumps({"attempts": attempts(run_dir), **result}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
