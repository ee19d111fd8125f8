"""Checkpoints: committed or not there, checked, kept, and refused where they do not belong."""

import copy
import hashlib
import io
import json
import pickle
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hvp_ray.distributed.world import World
from hvp_ray.errors import CheckpointError
from hvp_ray.runs.checkpoint import Checkpoint, CheckpointStore, CheckpointWriter, WrittenFile, weights_digest
from hvp_ray.training.trainee import build_trainee, take_checkpoint
from tests.helpers import ProgramInAPickle, tiny_config


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


def _saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _compressed(archive: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as before, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    return buffer.getvalue()


def _replace_state(root: Path, step: int, content: bytes) -> None:
    """Put another state into a checkpoint, with a manifest that agrees."""
    folder = root / f"step-{step:08d}"
    (folder / "state.pt").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("saved", [_saved, pickle.dumps])
@pytest.mark.parametrize("place", ["state", "method", "optimizer"])
def test_program_in_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, saved: Callable[[object], bytes], place: str
) -> None:
    proof = tmp_path / "proof"
    program = ProgramInAPickle(proof)
    empty = {"step": 2, "method": {}, "optimizer": {"state": {}, "param_groups": []}, "predictor": {}}
    state: object = empty | {place: program}
    content = saved(program if place == "state" else state)
    torch.load(io.BytesIO(content), weights_only=False) if saved is _saved else pickle.loads(content)
    assert proof.exists()  # it is a real one
    proof.unlink()
    store = _store(tmp_path / "run")
    store.write(_checkpoint(1))
    store.write(_checkpoint(2))
    _replace_state(tmp_path / "run", 2, content)
    for load in (lambda: store.load(2), store.load_newest):  # not passed over: somebody made it
        with pytest.raises(CheckpointError, match="is refused.*Nothing in it was executed") as refusal:
            load()
        assert "weights_only" not in str(refusal.value)
    assert not proof.exists()
    shutil.rmtree(tmp_path / "run" / "step-00000002")
    newest = store.load_newest()
    assert newest is not None
    assert newest.step == 1


def test_checkpoint_that_is_larger_inside_than_outside_is_refused(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.write(_checkpoint(1))
    optimizer = _checkpoint(1).optimizer
    small = {"step": 1, "method": {"weight": torch.zeros(2**22)}, "optimizer": optimizer, "predictor": {}}
    spread = small | {"method": {"weight": torch.zeros(1).expand(10**12)}}
    hidden = small | {
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1).expand(10**12)}}, "param_groups": []}
    }
    for content, message in (
        (_compressed(_saved(small)), "the archive is compressed"),
        (_saved(spread), "without its elements"),
        (_saved(hidden), "without its elements"),
        (_saved(small | {"step": 7}), "it is of step 7"),
        (_saved(small | {"method": {"weight": 3}}), "no step, method, optimizer and predictor"),
        (_saved([1, 2]), "is refused"),
        (b"not even an archive", "is refused"),
    ):
        _replace_state(tmp_path, 1, content)
        with pytest.raises(CheckpointError, match=message):
            store.load(1)


def test_manifest_that_is_none_counts_as_damage(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.write(_checkpoint(1))
    store.write(_checkpoint(2))
    for text in ("[]", "{}", '{"files": 3}', '{"files": {"state.pt": {"sha256": 5}}}', "[" * 100_000, "\x00"):
        (tmp_path / "step-00000002" / "manifest.json").write_text(text)
        newest = store.load_newest()
        assert newest is not None
        assert newest.step == 1


def test_other_folders_beside_checkpoints_are_left_alone(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.write(_checkpoint(1))
    for name in ("step-abc", "backup", "step-00000009-copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert store.committed_steps() == [1]


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


def _damage(root: Path, step: int) -> None:
    (root / f"step-{step:08d}" / "state.pt").write_bytes(b"not it")


def test_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for step in (1, 2):
        store.write(_checkpoint(step))
        _damage(tmp_path, step)
    with pytest.raises(CheckpointError, match=r"all checkpoints .* are damaged \(steps \[1, 2\]\)"):
        store.load_newest()


@pytest.mark.parametrize("keep", [1, 2])
def test_new_checkpoint_is_kept_where_later_ones_were_passed_over(tmp_path: Path, keep: int) -> None:
    for step in (1, 4, 5):
        _store(tmp_path, keep=3).write(_checkpoint(step))
    for step in (4, 5):
        _damage(tmp_path, step)
    store = _store(tmp_path, keep=keep)
    store.write(_checkpoint(2))
    assert store.committed_steps() == [1, 2][-keep:]
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.step == 2


def test_checkpoint_that_cannot_be_read_now_is_not_passed_over(tmp_path: Path) -> None:
    """A folder in the place of the file is an OSError as a disk that stumbles is."""
    store = _store(tmp_path)
    for step in (1, 2):
        store.write(_checkpoint(step))
    state = tmp_path / "step-00000002" / "state.pt"
    state.unlink()
    state.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read now"):
        store.load_newest()


class _GatedStore(CheckpointStore):
    """A storage that is as slow as the test wants."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), run_identity="a", keep=9)
        self.gate = threading.Event()

    def write_part(self, checkpoint: Checkpoint, world: World) -> WrittenFile:
        assert self.gate.wait(60.0)
        return super().write_part(checkpoint, world)


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_of_it(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), recipe="dino-digits")
    trainee = build_trainee(config, World(), torch.device("cpu"), None)
    store = _GatedStore(tmp_path / "checkpoints")
    writer = CheckpointWriter(store)

    def update() -> None:
        for parameter in trainee.method.parameters():
            parameter.grad = torch.ones_like(parameter)
        trainee.optimizer.step()

    update()
    before = copy.deepcopy((trainee.method.state_dict(), trainee.optimizer.state_dict()))
    writer.write(take_checkpoint(trainee, 1))
    update()
    writer.check()
    assert store.committed_steps() == [] and writer.num_written == 0
    store.gate.set()
    writer.write(take_checkpoint(trainee, 2))
    assert store.committed_steps()[0] == 1, "one at a time"
    writer.close()
    assert store.committed_steps() == [1, 2] and writer.num_written == 2
    first = store.load(1)
    assert weights_digest(first.method) == weights_digest(before[0]) != weights_digest(store.load(2).method)
    for index, state in before[1]["state"].items():
        assert all(torch.equal(value, first.optimizer["state"][index][name]) for name, value in state.items())


def test_checkpoint_that_cannot_be_written_fails_a_later_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    store = _GatedStore(tmp_path / "checkpoints")
    writer = CheckpointWriter(store)
    writer.write(_checkpoint(1))
    writer.check()
    store.gate.set()

    def check_until_it_raises() -> None:
        while True:
            writer.check()

    with pytest.raises(CheckpointError, match="the checkpoint of step 1 could not be written"):
        check_until_it_raises()
    writer.close()
