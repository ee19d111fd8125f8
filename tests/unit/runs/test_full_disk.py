"""A disk that is really full (a small file system in memory) while a run writes: a sentence, and later the same weights."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvp_ray.config import RunConfig
from hvp_ray.errors import CheckpointError
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.runs.checkpoint import CheckpointStore
from tests.helpers import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root and the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _config(output: Path) -> RunConfig:
    return tiny_config(str(output), run={"name": "run"}, training={"checkpoint_every_steps": 4, "num_steps": 16})


def test_run_on_a_full_disk_keeps_its_checkpoint_and_goes_on_to_the_same_weights(
    tmp_path: Path, small_disk: Path
) -> None:
    undisturbed = pretrain_in_process(_config(tmp_path / "roomy"))
    assert undisturbed is not None
    size = (tmp_path / "roomy" / "run" / "checkpoints" / "step-00000016" / "state-attempt-0001.pt").stat().st_size

    filling = small_disk / "somebody-elses-file"
    with filling.open("wb") as file:  # room for one checkpoint and a half
        file.write(b"\0" * (64 * 2**20 - size * 3 // 2 - 2**17))
    with pytest.raises(CheckpointError, match="could not be written.*No space left.*untouched. Make room"):
        pretrain_in_process(_config(small_disk))
    identity = undisturbed["run_identity"]
    store = CheckpointStore(str(small_disk / "run" / "checkpoints"), run_identity=identity, keep=2)
    before = store.load_newest()
    assert before is not None
    assert before.step == 4

    filling.unlink()
    resumed = pretrain_in_process(_config(small_disk))
    assert resumed is not None
    assert resumed["num_resumes"] == 1
    assert resumed["weights_digest"] == undisturbed["weights_digest"]
