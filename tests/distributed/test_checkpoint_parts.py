"""A sharded checkpoint: every rank writes its part, and it counts once all parts are there."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hvp_ray.distributed.world import World
from hvp_ray.errors import CheckpointError
from hvp_ray.runs.checkpoint import CheckpointStore, PartWriter, WrittenFile
from hvp_ray.training.trainee import Checkpoint
from tests.distributed.processes import run_ranks

pytestmark = pytest.mark.distributed

WEIGHT = torch.arange(6.0).view(3, 2)
OF_WEIGHT = {0: {"exp_avg": -WEIGHT, "step": torch.tensor(4.0)}}


class _GatedStore(CheckpointStore):
    """A storage that is as slow as the test wants."""

    def __init__(self, location: str) -> None:
        super().__init__(location, run_identity="a", keep=2)
        self.gate = threading.Event()

    def write_part(self, checkpoint: Checkpoint, world: World) -> WrittenFile:
        assert self.gate.wait(60.0)
        return super().write_part(checkpoint, world)


def _writer(store: CheckpointStore, rank: int, num_ranks: int) -> PartWriter:
    return PartWriter(store, World(rank=rank, num_ranks=num_ranks), torch.device("cpu"))


def _part(rank: int, step: int) -> Checkpoint:
    """Two rows of the weight on rank 0, one on rank 1."""
    rows = slice(0, 2) if rank == 0 else slice(2, 3)
    return Checkpoint(
        step=step,
        method={"weight": WEIGHT[rows], "center": torch.tensor([7.0])},
        optimizer={
            "state": {0: {"exp_avg": -WEIGHT[rows], "step": torch.tensor(4.0)}},
            "param_groups": [{"params": [0]}],
        },
        are_parts=(
            {"weight": True, "center": False},
            {"state": {0: {"exp_avg": True, "step": False}}, "param_groups": [{"params": [False]}]},
        ),
    )


def _write(rank: int, num_ranks: int, location: str) -> list[int]:
    """Write step 1; return the committed steps seen while rank 1 is still writing."""
    store = _GatedStore(location)
    writer = _writer(store, rank, num_ranks)
    if rank == 0:
        store.gate.set()
    writer.write(_part(rank, 1))
    for _ in range(3):
        writer.check()
    seen = store.committed_steps()
    writer.check()  # rank 0 has looked
    store.gate.set()
    writer.close()
    return seen


def test_commits_when_all_ranks_have_written_and_joins_their_parts(tmp_path: Path) -> None:
    assert run_ranks(_write, 2, str(tmp_path)) == [[], []]
    store = CheckpointStore(str(tmp_path), run_identity="a", keep=2)
    whole = store.load_newest()
    assert whole is not None and whole.step == 1 and whole.are_parts is None
    assert torch.equal(whole.method["weight"], WEIGHT) and torch.equal(whole.method["center"], torch.tensor([7.0]))
    assert whole.optimizer["param_groups"] == [{"params": [0]}]
    assert all(torch.equal(whole.optimizer["state"][0][name], value) for name, value in OF_WEIGHT[0].items())


def test_checkpoint_without_one_of_its_parts_is_damaged(tmp_path: Path) -> None:
    run_ranks(_write, 2, str(tmp_path))
    (tmp_path / "step-00000001" / "state-00001-of-00002.pt").unlink()
    with pytest.raises(CheckpointError, match="state-00001-of-00002.pt is missing"):
        CheckpointStore(str(tmp_path), run_identity="a", keep=2).load(1)


def _fail(rank: int, num_ranks: int, location: str, at_writing: bool) -> str:
    """Let rank 1 fail to write its part, or rank 0 to commit."""
    place = Path(location) / "in the way" if rank == 1 and at_writing else Path(location)
    if rank == 0 and not at_writing:
        (place / "step-00000001" / "manifest.json").mkdir(parents=True)
    writer = _writer(CheckpointStore(str(place), run_identity="a", keep=2), rank, num_ranks)
    writer.write(_part(rank, 1))
    try:
        while True:
            writer.check()
    except CheckpointError as error:
        return str(error)
    finally:
        writer.close(has_failed=True)


@pytest.mark.parametrize("at_writing", [True, False])
def test_failure_of_one_rank_ends_all(tmp_path: Path, at_writing: bool) -> None:
    (tmp_path / "in the way").write_text("a file")
    messages = run_ranks(_fail, 2, str(tmp_path), at_writing)
    failed = int(at_writing)
    assert messages[failed].startswith("the checkpoint of step 1 could not be written to")
    expected = f"trainer {failed} could not write the checkpoint of step 1; its log has the reason"
    assert messages[1 - failed] == expected
    if not at_writing:
        (tmp_path / "step-00000001" / "manifest.json").rmdir()
    assert CheckpointStore(str(tmp_path), run_identity="a", keep=2).committed_steps() == []


def _leave(rank: int, num_ranks: int, location: str) -> Any:
    writer = _writer(CheckpointStore(location, run_identity="a", keep=2), rank, num_ranks)
    writer.write(_part(rank, 1))
    writer.close(has_failed=True)  # waits for no other rank
    return writer.num_written


def _continue(rank: int, num_ranks: int, location: str) -> int:
    writer = _writer(CheckpointStore(location, run_identity="a", keep=2), rank, num_ranks)
    for step in (2, 3):
        writer.write(_part(rank, step))
    writer.close()
    return writer.num_written


def test_failed_run_commits_no_parts_and_the_next_attempt_removes_them(tmp_path: Path) -> None:
    assert run_ranks(_leave, 2, str(tmp_path)) == [0, 0]
    store = CheckpointStore(str(tmp_path), run_identity="a", keep=2)
    assert store.load_newest() is None and (tmp_path / "step-00000001").is_dir()
    assert run_ranks(_continue, 2, str(tmp_path)) == [2, 2]
    assert store.committed_steps() == [2, 3] and not (tmp_path / "step-00000001").exists()


def test_files_that_are_not_parts_of_one_checkpoint_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), run_identity="a", keep=2)
    wholes = [dataclasses.replace(_part(rank, 1), are_parts=None) for rank in range(2)]
    store.commit(1, [store.write_part(whole, World(rank=r, num_ranks=2)) for r, whole in enumerate(wholes)])
    with pytest.raises(CheckpointError, match="its parts do not fit together"):
        store.load(1)
