"""Two nccl ranks, each on its own GPU, equal one rank with the same global batch."""

import pytest
import torch

from tests.distributed.processes import run_ranks
from tests.distributed.test_ranks import check_ranks_equal_one, two_updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs a GPU for each rank: two"),
]


def _two_exact_updates(rank: int, num_ranks: int) -> dict[str, dict[str, object]]:
    torch.backends.cudnn.allow_tf32 = False
    return two_updates(rank, num_ranks, "cuda")


def test_two_nccl_ranks_equal_one_rank_in_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ranks = run_ranks(_two_exact_updates, 2, backend="nccl")
    check_ranks_equal_one(ranks, torch.device("cuda", 0), tolerance=1e-4)
