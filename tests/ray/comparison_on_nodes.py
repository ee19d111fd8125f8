"""Compare on two nodes and a bucket; a task's process dies, then a node; another machine continues; print a line of JSON.

python -m tests.ray.comparison_on_nodes FOLDER
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

from hvp_ray.launch.environment import prepare_ray_environment

prepare_ray_environment()

import psutil
import ray
from ray.cluster_utils import Cluster

from hvp_ray.comparison.report import write_report
from hvp_ray.comparison.runner import do_runs
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.comparison.study import Study, open_study
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.files import Folder
from hvp_ray.runs.location import for_all_nodes
from hvp_ray.runs.storage import fetch_run
from hvp_ray.tracking.run_log import ATTEMPTS, read_records
from tests.helpers import tiny_config
from tests.s3_server import s3_server
from tests.waiting import PATIENCE_SECONDS, wait_until

NUM_STEPS = 80


def study_of(output: str) -> Study:
    """Return a comparison of two runs with a checkpoint every fourth step."""
    base: RunConfig = for_all_nodes(tiny_config(output, training={"num_steps": NUM_STEPS}, cluster={"device": "cpu"}))
    numbers = dict.fromkeys(("render_cpu_seconds", "views_per_image", "forwards_per_image", "memory_bytes"), 1.0)
    return open_study(
        base,
        open_dataset(base.data),
        name="c",
        arm_names=["vanilla", "hardest"],
        seeds=[0],
        accounting="counted",
        measure=lambda arms: {arm: StepCost(step_seconds=1.0, counted_operations=1.0, **numbers) for arm in arms},
    )


def _has_checkpoint(location: str) -> bool:
    return any(name.endswith("manifest.json") for name in Folder(location).names("checkpoints"))


def _process_of(location: str) -> psutil.Process:
    """Return the process of the newest attempt at a run."""
    copy = fetch_run(location, folders=("log",), option="run.output")
    return psutil.Process(list(read_records(copy, ATTEMPTS, dropped=True))[-1]["process_id"])


def main(folder: Path, uri: str) -> dict[str, Any]:
    """Compare, disturb, compare again elsewhere; return what happened."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "driver")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [
        cluster.add_node(
            num_cpus=1, object_store_memory=100 * 2**20, env_vars={"XDG_CACHE_HOME": str(folder / f"node-{index}")}
        )
        for index in range(2)
    ]
    ray.init(address=cluster.address, log_to_driver=False)
    study = study_of(uri)
    vanilla, hardest = (run.location for run in study.runs())
    failures: list[BaseException] = []

    def compare() -> None:
        try:
            do_runs(study, mode="inline", parallel=2, show=lambda _progress: None)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=compare)
    thread.start()
    wait_until(lambda: failures or _has_checkpoint(vanilla), "a checkpoint of the first run")
    assert not failures, failures
    _process_of(vanilla).send_signal(signal.SIGKILL)
    wait_until(lambda: failures or _has_checkpoint(hardest), "a checkpoint of the second run")
    raylet = _process_of(hardest).ppid()
    (lost,) = [node for node in nodes if node.all_processes["raylet"][0].process.pid == raylet]
    cluster.remove_node(lost, allow_graceful=False)
    thread.join(timeout=PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert not failures, failures

    claims = [Folder(location).names("owner") for location in (vanilla, hardest)]
    os.environ["XDG_CACHE_HOME"] = str(folder / "another-driver")
    again = study_of(uri)
    do_runs(again, mode="inline", parallel=2, show=lambda _progress: None)
    report = json.loads(write_report(again, metric="knn_top1").json_path.read_bytes())
    summaries = [json.loads(Folder(location).read("summary.json") or b"") for location in (vanilla, hardest)]
    ray.shutdown()
    cluster.shutdown()
    return {
        "digests": [run["weights_digest"] for run in report["runs"]],
        "resumes": [summary["num_resumes"] for summary in summaries],
        "problems": [summary["problems"] for summary in summaries],
        "is_repeated": claims != [Folder(location).names("owner") for location in (vanilla, hardest)],
    }


if __name__ == "__main__":
    with s3_server() as place:
        print(json.dumps(main(Path(sys.argv[1]), place.format(""))), flush=True)
