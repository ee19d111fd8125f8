"""Run with a pool that sizes itself, on nodes of one machine that join and are drained; then give idle workers back.

python -m tests.ray.pool_nodes FOLDER

Writes summary, messages and what happened to the drained node to `FOLDER/pool.json`. Loads are measured over a shorter time
than usual.
"""

import functools
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

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from hvp_ray.config import RunConfig
from hvp_ray.launch import pool_supervisor
from hvp_ray.launch.stop import StoppedError, StopRequest
from tests.helpers import encode, photograph_like, tiny_config
from tests.ray.runs import launch_quietly
from tests.ray.view_worker_processes import trainer_stopped, wait_for_step
from tests.waiting import PATIENCE_SECONDS, wait_until

WINDOW_SECONDS = 3.0
NUM_STEPS = 250
STORE_BYTES = 100 * 2**20
DRAIN_SECONDS = 600.0
"""The deadline of the notice; the node is empty long before."""


def pool_config(output: Path, name: str) -> RunConfig:
    """Return a run of which the trainer waits: its images are large, and its views and network are small."""
    return tiny_config(
        str(output),
        run={"name": name},
        data={"source": str(output / "images"), "num_images": None, "test_fraction": 0.0},
        training={"num_steps": NUM_STEPS, "images_per_step": 16, "checkpoint_every_steps": 100},
        selection={"rule": "first"},
        cluster={"num_view_workers": "auto", "batches_in_flight": "auto"},
    )


def write_images(folder: Path) -> None:
    """Write photographs that take long to decode."""
    generator = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for index in range(32):
        (folder / "class" / f"{index}.jpg").write_bytes(encode(photograph_like(generator, 1200, 1200), "JPEG"))


class _Run(threading.Thread):
    """A run in a thread, because only the main thread can add nodes."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self._config = config
        self.messages: list[str] = []
        self.result: dict[str, Any] = {}
        self.stop = StopRequest()

    def run(self) -> None:
        try:
            self.result["summary"] = launch_quietly(self._config, self.messages, stop=self.stop)
        except StoppedError:
            self.result["stopped"] = True
        except BaseException as error:
            self.result["error"] = repr(error)

    def wait_for_message(self, text: str) -> None:
        wait_until(lambda: any(text in message for message in self.messages) or not self.is_alive(), text, pause=0.1)
        if not any(text in message for message in self.messages):
            raise RuntimeError(f"the run ended before {text!r}: {self.result}, {self.messages}")


def _view_node(cluster: Cluster, num_workers: int) -> Any:
    return cluster.add_node(num_cpus=num_workers, resources={"view": num_workers}, object_store_memory=STORE_BYTES)


def _view_workers_up() -> int:
    actors = ray._private.state.actors().values()
    return sum(actor["ActorClassName"] == "ViewWorker" and actor["State"] == "ALIVE" for actor in actors)


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def main(output: Path) -> None:
    """Run, add a node, drain the other one, and run again with nearly nothing to render."""
    for name in ("LoadMeter", "PoolController"):
        of_pool = functools.partial(getattr(pool_supervisor, name), window_seconds=WINDOW_SECONDS)
        setattr(pool_supervisor, name, of_pool)
    head = {"num_cpus": 1, "resources": {"trainer": 1}, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    first = _view_node(cluster, 1)
    ray.init(address=cluster.address, log_to_driver=False)
    run = _Run(pool_config(output, "pool"))
    run.start()
    wait_for_step(output / "pool", 1)
    _view_node(cluster, 2)
    run.wait_for_message("view workers 1 -> 2")
    with trainer_stopped(output / "pool"):
        wait_until(lambda: _view_workers_up() == 2, "a second worker", pause=0.1)
    deadline_ms = int((time.time() + DRAIN_SECONDS) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    gcs = ray._raylet.GcsClient(address=cluster.address)
    assert gcs.drain_node(first.node_id, reason, "test", deadline_ms)[0]
    run.wait_for_message("on a drained node")
    # Ray ends a drained node itself, once no actor runs there.
    wait_until(lambda: not _is_alive(first.node_id) or not run.is_alive(), "the end of the drained node", pause=0.1)
    node_left_during_run = run.is_alive()
    run.join()

    endless = {"run": {"name": "idle"}, "training": {"num_steps": 100_000}, "cluster": {"num_view_workers": "auto"}}
    idle = _Run(tiny_config(str(output), **endless))
    idle.start()
    idle.wait_for_message("view workers 2 -> 1")
    wait_until(lambda: _view_workers_up() == 1, "the end of an idle worker", pause=0.1)
    idle.stop.ask(patience_seconds=PATIENCE_SECONDS)
    idle.join()
    outcome = {
        "messages": run.messages,
        "node_left_during_run": node_left_during_run,
        "idle": {"messages": idle.messages, **idle.result},
        **run.result,
    }
    (output / "pool.json").write_text(json.dumps(outcome))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
