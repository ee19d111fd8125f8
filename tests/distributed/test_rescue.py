"""Rescue on several ranks: each rescues the easiest of its own images, and SimCLR contrasts with those of all ranks."""

import pytest
import torch
from torch import Tensor

from hvp_ray.distributed.world import gather_over_ranks
from hvp_ray.methods.method import Ranks, ViewTensors
from hvp_ray.selection import easiest_images
from tests.distributed.processes import run_ranks
from tests.unit.methods.test_rescue import IMAGES, METHODS, candidates_of, check_simclr, frozen_method, views_of

pytestmark = pytest.mark.distributed


def _scores_of_rank(rank: int, num_ranks: int) -> dict[str, Tensor]:
    own = slice(rank * IMAGES // num_ranks, (rank + 1) * IMAGES // num_ranks)
    scores = {}
    for name in METHODS:
        method, views = frozen_method(name, Ranks(rank=rank, gather=gather_over_ranks)), views_of(name)
        mine = ViewTensors(
            global_views=views.global_views[:, own],
            local_views=None if views.local_views is None else views.local_views[:, own],
            masks=None if views.masks is None else views.masks[:, own],
        )
        with torch.no_grad():
            scores[name] = method.score(mine, candidates_of(name, share=0.5)).pairs_BP
    return scores


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_each_rank_rescues_its_easiest_and_contrasts_with_all_ranks(num_ranks: int) -> None:
    ranks = run_ranks(_scores_of_rank, num_ranks)
    for name in METHODS:
        method, views = frozen_method(name), views_of(name)
        found = torch.cat([of_rank[name] for of_rank in ranks])
        with torch.no_grad():
            of_pair = method.score(views.first_pair(), candidates_of(name, num_views=2))
            full = method.score(views, candidates_of(name)).pairs_BP
            outputs = method.embed(views)
        hardest, each = of_pair.best_of_pairs(2)[:, 0], IMAGES // num_ranks
        rescued = [
            rank * each + image
            for rank in range(num_ranks)
            for image in easiest_images(hardest[rank * each : (rank + 1) * each], each // 2).tolist()
        ]
        if name == "simclr":
            check_simclr(found, outputs.of_globals["projections"], rescued, all_negatives=False)
        else:
            is_rescued = torch.zeros(IMAGES, dtype=torch.bool)
            is_rescued[rescued] = True
            expected = full.where(is_rescued[:, None] | (torch.arange(full.shape[1]) == 0), -torch.inf)
            torch.testing.assert_close(found, expected)
