"""Before a run starts: what is recorded of the code and the data."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.data.source import open_source
from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.prepare import git_commit, prepare_run
from hvp_ray.tracking.trackers import lacks_records
from tests.helpers import encode, photograph_like, tiny_config


def _git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_is_that_of_the_repository_that_has_the_file_and_none_in_a_virtual_environment(tmp_path: Path) -> None:
    own = tmp_path / "package" / "module.py"
    installed = tmp_path / ".venv" / "lib" / "module.py"
    for path in (own, installed):
        path.parent.mkdir(parents=True)
        path.write_text("a = 1\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", "package")
    _git(tmp_path, "commit", "--quiet", "--message", "one")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(own) == commit
    own.write_text("a = 2\n")
    assert git_commit(own) == f"{commit}-dirty"
    assert git_commit(installed) is None
    assert git_commit(tmp_path / "absent" / "module.py") is None


@pytest.mark.slow
def test_run_that_lies_in_its_own_data_finds_the_same_images_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when one stands in a folder of images and names no `run.output`; MLflow's files lie there too."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "my%20images #1"
    generator = np.random.default_rng(0)
    for index in range(40):
        path = root / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photograph_like(generator, 12, 12)))
    config = tiny_config(
        str(root / "runs"),
        run={"name": "one"},
        data={"source": str(root), "num_images": None, "test_fraction": 0.2},
        training={"epochs": 1},
        tracking={"uri": "auto", "num_figure_images": 2},
    )
    before = open_source(str(root), config.data)
    summary = pretrain_in_process(config)
    assert summary is not None
    assert not lacks_records(root / "runs" / "one")
    assert list(root.glob("runs/mlflow-artifacts/*/artifacts/figures/*.png"))
    after = open_source(str(root), config.data)
    assert (after.num_samples, after.fingerprint()) == (before.num_samples, before.fingerprint())
    job = prepare_run(config, resolve_inline(config.cluster))
    kept = json.loads((root / "runs" / "one" / "summary.json").read_text())
    assert job.inventory is not None
    assert kept["data"]["source"]["num_images"] == job.inventory.source.num_images == 40
    assert job.inventory is not None
    assert kept["data"]["source"]["num_classes"] == 2
