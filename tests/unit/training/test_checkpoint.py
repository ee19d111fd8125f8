"""Checkpoints: committed or not there, checked, kept, and refused where they do not belong."""

import json
from pathlib import Path

import pytest
import torch

from hvp_ray.errors import CheckpointError
from hvp_ray.training.checkpoint import Checkpoint, CheckpointStore, weights_digest


def _store(root: Path, identity: str = "a", keep: int = 2) -> CheckpointStore:
    return CheckpointStore(str(root), run_identity=identity, keep=keep)


def _checkpoint(step: int) -> Checkpoint:
    method = {"weight": torch.full((3,), float(step)), "count": torch.tensor(step)}
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2) * step
    optimizer.step()
    return Checkpoint(step=step, method=method, optimizer=optimizer.state_dict())


@pytest.mark.parametrize("as_uri", [False, True])
def test_newest_comes_back_bit_for_bit_and_old_ones_are_dropped(tmp_path: Path, as_uri: bool) -> None:
    location = tmp_path.as_uri() if as_uri else str(tmp_path)
    store = CheckpointStore(location, run_identity="a", keep=2)
    assert store.load_newest() is None
    for step in (5, 10, 15):
        store.write(_checkpoint(step))
    assert store.committed_steps() == [10, 15]
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 15
    assert weights_digest(loaded.method) == weights_digest(_checkpoint(15).method)
    momentum = loaded.optimizer["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, torch.full((2,), 15.0))


def test_what_has_no_manifest_does_not_exist(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.write(_checkpoint(1))
    store.write(_checkpoint(2))
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert store.committed_steps() == [1]
    store.write(_checkpoint(2))  # a second attempt writes over the torn one
    assert store.committed_steps() == [1, 2]


def test_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = _store(tmp_path)
    store.write(_checkpoint(1))
    store.write(_checkpoint(2))
    state = tmp_path / "step-00000002" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(bytes(content))
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1
    assert "is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(2)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    _store(tmp_path).write(_checkpoint(1))
    with pytest.raises(CheckpointError, match="another identity"):
        _store(tmp_path, identity="b").load_newest()


def test_full_disk_leaves_the_one_before_usable(tmp_path: Path) -> None:
    """A folder in the place of the file is an OSError as a full disk is."""
    store = _store(tmp_path)
    store.write(_checkpoint(1))
    (tmp_path / "step-00000002" / "state.pt").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="could not be written.*untouched"):
        store.write(_checkpoint(2))
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 1


def test_no_pickled_code_is_executed(tmp_path: Path) -> None:
    import hashlib
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "owned").touch, ())

    store = _store(tmp_path)
    store.write(_checkpoint(1))
    content = pickle.dumps({"step": 1, "method": Evil(), "optimizer": {}})
    (tmp_path / "step-00000001" / "state.pt").write_bytes(content)
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    manifest["files"]["state.pt"]["sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="[Ww]eights|pickle|load"):
        store.load(1)
    assert not (tmp_path / "owned").exists()


def test_digest_sees_names_types_shapes_and_bits() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.float64), "b": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0]), "b": torch.ones(2)},
    ]
    digests = {weights_digest(state) for state in (base, *others)}
    assert len(digests) == 5
    assert weights_digest(dict(reversed(base.items()))) == weights_digest(base)
