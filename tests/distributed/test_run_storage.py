"""A checkpoint on a bucket is committed only after every rank has pushed its logs; if one cannot, all ranks stop."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import hvp_ray.files
from hvp_ray.errors import CheckpointError
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.recorder import push_on_all_ranks
from hvp_ray.runs.storage import RunStorage
from hvp_ray.tracking.run_log import RunLog
from tests.distributed.processes import run_ranks
from tests.helpers import tiny_config

pytestmark = pytest.mark.distributed

SEGMENT = "log/attempt-0001-step-00000000"


def _push_twice(rank: int, num_ranks: int, bucket: str, cache: str) -> list[str]:
    """Push while a file blocks the folder of rank 1, and again without it; return both outcomes."""
    os.environ["XDG_CACHE_HOME"] = f"{cache}/machine-{rank}"
    hvp_ray.files._PAUSES_SECONDS = (0.01,)
    config = tiny_config(Path(bucket).as_uri(), run={"name": "run"}, cluster={"num_trainers": num_ranks})
    job = prepare_run(config, resolve_inline(config.cluster), is_writer=rank == 0)
    with RunStorage(job.run_dir, job.run_uri, rank=rank) as storage:
        RunLog(storage.folder).write(f"unreadable-rank-{rank}", {"step": 0, "replacements": []})
        results = []
        for _ in range(2):
            try:
                push_on_all_ranks(storage, job.run_uri, torch.device("cpu"))
                results.append("pushed")
            except CheckpointError as error:
                results.append(str(error))
            if rank == 1 and len(results) == 1:
                shutil.rmtree(Path(bucket, "run", SEGMENT, "unreadable-rank-1.jsonl"))
        return results


def test_no_rank_goes_on_when_one_could_not_push(tmp_path: Path) -> None:
    in_the_way = tmp_path / "bucket" / "run" / SEGMENT / "unreadable-rank-1.jsonl"
    (in_the_way / "a folder in the place of the file").mkdir(parents=True)
    (first, then_first), (second, then_second) = run_ranks(_push_twice, 2, str(tmp_path / "bucket"), str(tmp_path))
    assert "another trainer could not write" in first
    assert "could not be written" in second
    assert then_first == then_second == "pushed"
    for rank in range(2):
        assert (in_the_way.parent / f"unreadable-rank-{rank}.jsonl").read_bytes()
