"""Before a checkpoint of a run on a bucket is committed, what every rank decided is there; or no rank goes on."""

import os
from pathlib import Path

import pytest
import torch

from hvp_ray import remote_files
from hvp_ray.errors import CheckpointError
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.rank import push_on_all_ranks
from hvp_ray.runs.storage import RunStorage
from tests.distributed.processes import run_ranks
from tests.helpers import tiny_config

pytestmark = pytest.mark.distributed


def _push_twice(rank: int, num_ranks: int, bucket: str, cache: str) -> list[str]:
    """Push while something is in the way of rank 1, and once more without; return what came of it."""
    os.environ["XDG_CACHE_HOME"] = f"{cache}/machine-{rank}"
    remote_files._PAUSES_SECONDS = (0.01,)
    config = tiny_config(Path(bucket).as_uri(), run={"name": "run"}, cluster={"num_trainers": num_ranks})
    job = prepare_run(config, resolve_inline(config.cluster), is_writer=rank == 0)
    with RunStorage(job.run_dir, job.run_uri, rank=rank) as storage:
        (storage.folder / f"unreadable-rank-{rank}.jsonl").write_text('{"step": 0, "replacements": []}\n')
        results = []
        for _ in range(2):
            try:
                push_on_all_ranks(storage, job, torch.device("cpu"))
                results.append("pushed")
            except CheckpointError as error:
                results.append(str(error))
            if rank == 1 and len(results) == 1:
                Path(bucket, "run", "unreadable-rank-1.jsonl").unlink()
        return results


def test_no_rank_goes_on_when_one_could_not_push(tmp_path: Path) -> None:
    in_the_way = tmp_path / "bucket" / "run" / "unreadable-rank-1.jsonl"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where the folder of parts must be")
    (first, then_first), (second, then_second) = run_ranks(_push_twice, 2, str(tmp_path / "bucket"), str(tmp_path))
    assert "another trainer could not write" in first
    assert "could not be written" in second
    assert then_first == then_second == "pushed"
    for rank in range(2):
        assert list((in_the_way.parent / f"unreadable-rank-{rank}.jsonl").iterdir())
