"""Run on nodes of one machine of which one is broken, one is lost and one joins, with a decoder that crashes.

python -m tests.ray.cluster_faults FOLDER SHIP

First on the Python path of the view nodes is a JPEG decoder with a bug (`dying_decoder/`), or one that cannot be imported
(`broken_node/`). The images are in `FOLDER/poisoned-images`, SHIP is `cluster.ship`. Writes summary and messages to
`FOLDER/SHIP.json`.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import psutil
import ray
from ray.cluster_utils import Cluster

from tests.ray.fault_runs import NUM_STEPS, fault_config
from tests.ray.runs import launch_quietly
from tests.ray.view_worker_processes import state, stop, trainer_stopped, wait_for_step
from tests.waiting import wait_until

HERE = Path(__file__).parent
STORE_BYTES = 100 * 2**20
FETCH_SECONDS = 1.0
"""Time for the fetch to begin: no state outside the trainer shows it. A batch takes a millisecond."""


def _add_view_node(cluster: Cluster, python_path: str, *, num_workers: int) -> Any:
    return cluster.add_node(
        num_cpus=num_workers,
        resources={"view": num_workers},
        object_store_memory=STORE_BYTES,
        env_vars={"PYTHONPATH": str(HERE / python_path)},
    )


def _lose_node_that_holds_batches(run_dir: Path, cluster: Cluster, node: Any) -> None:
    """Lose a node while the trainer fetches a batch that was finished there."""
    worker = stop("rendering")
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    with trainer_stopped(run_dir):
        worker.resume()
        wait_until(lambda: state(worker) == "idle", "a finished batch")
        raylet.suspend()  # it holds the batches and sends none
    time.sleep(FETCH_SECONDS)
    cluster.remove_node(node, allow_graceful=False)


def main(output: Path, ship: str) -> None:
    """Run, disturb the nodes, and write the outcome."""
    name = f"on-nodes-{ship}"
    head = {"num_cpus": 2, "resources": {"trainer": 1}, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    broken = _add_view_node(cluster, "broken_node", num_workers=1)
    node = _add_view_node(cluster, "dying_decoder", num_workers=2)
    ray.init(address=cluster.address, log_to_driver=False)
    config = fault_config(output, name, output / "poisoned-images", num_view_workers=3, ship=ship)
    messages: list[str] = []
    result: dict[str, Any] = {"messages": messages}

    def run() -> None:
        try:
            result["summary"] = launch_quietly(config, messages)
        except BaseException as error:
            result["error"] = repr(error)

    # Only the main thread can add nodes.
    thread = threading.Thread(target=run)
    thread.start()
    wait_for_step(output / name, 1)
    cluster.remove_node(broken)  # before Ray places other workers there
    wait_for_step(output / name, NUM_STEPS // 2)  # two epochs: the decoder has crashed by now
    _lose_node_that_holds_batches(output / name, cluster, node)
    _add_view_node(cluster, "dying_decoder", num_workers=2)
    thread.join()
    (output / f"{ship}.json").write_text(json.dumps(result))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
