"""Run pretrain.py with a proxy, without a home, with a long TMPDIR, and end it by a signal to its process group."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.runs import recorded_steps
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.long]

OPTIONS = {
    "run.name": "run",
    "data.num_images": "200",
    "training.epochs": "100000",
    "training.images_per_step": "16",
    "training.checkpoint_every_steps": "2",
    "tracking.uri": "none",
    "tracking.knn_images": "40",
    "cluster.num_view_workers": "1",
}


def test_run_works_behind_a_proxy_without_a_home_and_ends_with_its_process_group(tmp_path: Path) -> None:
    """SIGTERM goes to all processes, as SLURM and Docker send it. A Ray of its own, because the signal ends it."""
    temporary = tmp_path / ("a-long-name-" * 5)
    temporary.mkdir()
    left_out = ("RAY_AUTH_MODE", "RAY_TMPDIR", "no_proxy", "NO_PROXY")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"HOME": "/", "TMPDIR": str(temporary)}
    environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    words = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    command = [sys.executable, "pipelines/pretrain.py", "--run.output", str(tmp_path), *words]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as program:
        checkpoints = tmp_path / "run" / "checkpoints"
        wait_until(lambda: any(checkpoints.glob("*/manifest.json")) or program.poll() is not None, "a checkpoint")
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGTERM)
        printed = program.communicate()[0]
    assert recorded_steps(tmp_path / "run"), printed
    assert program.returncode == 1, printed
    assert "start the run again with its name" in printed
    assert "Traceback" not in printed
    assert "Failed to connect to GCS" not in printed
    assert (temporary / f"hvp_ray-home-{os.getuid()}" / ".ray" / "auth_token").stat().st_size > 0
