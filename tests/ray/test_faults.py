"""Disturb view workers, their nodes, the object store and the images: the weights equal those of an undisturbed run."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from hvp_ray.launch.local import pretrain_in_process
from tests.ray.fault_runs import NUM_DAMAGED, NUM_STEPS, POISONED_ID, fault_config, write_images
from tests.ray.runs import digest_from_checkpoint, launch_quietly, recorded_steps
from tests.ray.view_worker_processes import catch, in_state, state, stop, trainer_stopped, wait_for_step
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.long]

STOPPED_SECONDS = 30.0
MIB = 2**20


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "images", is_poisoned=False)
    write_images(folder / "poisoned-images", is_poisoned=True)
    return folder


@pytest.fixture(scope="module")
def undisturbed(output: Path) -> str:
    """Return the digest of the run, rendered in the trainer's own process."""
    summary = pretrain_in_process(fault_config(output, "undisturbed", output / "images"))
    assert summary is not None
    assert summary["num_unreadable_images"] == NUM_DAMAGED + 1
    assert summary["num_quarantined_images"] == 0
    return str(summary["weights_digest"])


def _check(output: Path, name: str, summary: dict[str, Any], undisturbed: str) -> None:
    """Check the weights, that each step is journalled once, and the count of damaged images."""
    assert summary["weights_digest"] == digest_from_checkpoint(output / name) == undisturbed
    assert recorded_steps(output / name) == list(range(1, NUM_STEPS + 1))
    assert summary["num_resumes"] == 0
    assert summary["num_unreadable_images"] == NUM_DAMAGED + 1


def _fill_store() -> list[Any]:
    """Put more than the session's store of 400 MiB holds; half of it is in use and cannot be spilled."""
    in_use = [ray.get(ray.put(np.full(50 * MIB, index, np.uint8))) for index in range(4)]
    return in_use + [ray.put(np.full(50 * MIB, index, np.uint8)) for index in range(6)]


@pytest.mark.usefixtures("ray_session")
def test_workers_killed_at_any_moment_a_straggler_and_a_full_store_change_nothing(
    output: Path, undisturbed: str
) -> None:
    """Kill one of three workers when idle, starting, rendering, and with a finished batch that no trainer has received.

    Another one is stopped for 30 s and then answers requests that others have answered. The object store is full throughout.
    """
    run_dir = output / "disturbed"
    is_up = ("idle", "rendering")

    def disturb() -> None:
        wait_for_step(run_dir, 2)
        others = _fill_store()
        straggler = stop("rendering")
        stopped_at = time.monotonic()

        def wait_for_successor() -> None:
            wait_until(lambda: len(in_state(*is_up, but=(straggler,))) == 2, "a worker to restart")

        wait_for_step(run_dir, 5)
        with trainer_stopped(run_dir):
            catch("idle", but=(straggler,)).kill()
            catch("starting").kill()
            wait_for_successor()
        wait_for_step(run_dir, 8)
        stop("rendering", but=(straggler,)).kill()
        with trainer_stopped(run_dir):
            wait_for_successor()
        wait_for_step(run_dir, 11)
        victim = stop("rendering", but=(straggler,))
        with trainer_stopped(run_dir):
            victim.resume()
            wait_until(lambda: state(victim) == "idle", "a finished batch")
            victim.kill()
            wait_for_successor()
        wait_for_step(run_dir, 15)
        with trainer_stopped(run_dir):
            wait_until(lambda: time.monotonic() > stopped_at + STOPPED_SECONDS, "30 s of the straggler")
            assert state(straggler) == "rendering"  # Ray has left it alone
            straggler.resume()
            wait_until(lambda: state(straggler) == "idle", "the straggler's answer")
        del others

    images = output / "images"
    config = fault_config(output, "disturbed", images, num_view_workers=3, batches_in_flight=4, late_seconds=0.5)
    messages: list[str] = []
    with ThreadPoolExecutor(1) as background:
        disturbing = background.submit(disturb)
        summary = launch_quietly(config, messages)
        disturbing.result()
    _check(output, "disturbed", summary, undisturbed)
    assert summary["num_worker_restarts"] == 4
    assert summary["num_batches_repeated"] >= 3  # rendering, stored, late
    assert any("is late" in message for message in messages)
    assert any("died" in message for message in messages)
    assert summary["spilled_bytes"] >= 50 * MIB
    assert summary["num_quarantined_images"] == 0


@pytest.mark.parametrize("ship", ["views", "pixels"])
def test_worker_that_cannot_start_decoder_that_dies_and_node_lost_with_finished_batches_change_nothing(
    output: Path, undisturbed: str, ship: str
) -> None:
    """Break one view node of two, crash the decoder of the other, lose it while its batches are fetched, and add a new one.

    The image that crashes the decoder is a damaged one in the undisturbed run. A Ray of its own, because nodes are lost.
    """
    program = [sys.executable, "-m", "tests.ray.cluster_faults", str(output), ship]
    done = subprocess.run(program, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((output / f"{ship}.json").read_text())
    assert "error" not in result, result
    summary, messages = result["summary"], "\n".join(result["messages"])
    _check(output, f"on-nodes-{ship}", summary, undisturbed)
    assert summary["num_quarantined_images"] == 1
    assert f"images [{POISONED_ID}] crash the decoder and are quarantined" in messages
    assert (
        summary["num_worker_restarts"] == 3 + 2
    )  # deaths before the quarantine, once in four epochs; workers of the node
    assert summary["num_batches_repeated"] >= 4
