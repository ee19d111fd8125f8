"""Candidates, choice and gather against slow loops."""

import numpy as np
import pytest
import torch

from hvp_ray.errors import ShapeError
from hvp_ray.methods.simsiam import score_pairs
from hvp_ray.selection import choose_pairs, gather_views, pair_table
from tests.helpers import slow_hardest_pairs

CPU = torch.device("cpu")


def _choose(rule: str, scores: torch.Tensor | None = None, num_views: int = 4, **options: torch.Tensor) -> np.ndarray:
    num_images = len(next(v for v in (scores, *options.values(), torch.zeros(3)) if v is not None))
    selection = choose_pairs(rule, num_views=num_views, num_images=num_images, device=CPU, scores_BP=scores, **options)
    return selection.view_indices.numpy()


def test_pair_table_is_lexicographic() -> None:
    assert pair_table(4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert pair_table(8).shape == (28, 2)
    with pytest.raises(ShapeError):
        pair_table(1)


def test_hardest_pairs_equal_the_papers_loop_on_64_images(generator: np.random.Generator) -> None:
    projections, predictions = generator.normal(size=(2, 4, 64, 16))
    scores = score_pairs(torch.from_numpy(projections).float(), torch.from_numpy(predictions).float())
    chosen = _choose("hardest", scores).T
    assert [tuple(pair) for pair in chosen.tolist()] == slow_hardest_pairs(projections, predictions)


def test_hardest_and_easiest_are_argmax_and_argmin_and_ties_go_to_the_lowest_pair() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.2, 0.1, 0.3], [0.5] * 6])
    assert _choose("hardest", scores).T.tolist() == [[0, 2], [0, 1]]
    assert _choose("easiest", scores).T.tolist() == [[0, 1], [0, 1]]


def test_first_takes_views_0_and_1_and_random_takes_what_was_drawn() -> None:
    assert _choose("first").T.tolist() == [[0, 1]] * 3
    assert _choose("random", random_pairs=torch.tensor([5, 0, 3])).T.tolist() == [[2, 3], [0, 1], [1, 2]]


def test_min_iou_takes_the_least_overlap() -> None:
    ious = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1, 0.6]])
    assert _choose("min_iou", iou_BP=ious).T.tolist() == [[1, 3]]


def test_all_pairs_takes_every_view() -> None:
    assert _choose("all_pairs", num_views=3).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_missing_or_misshapen_scores_are_refused() -> None:
    with pytest.raises(ShapeError, match="scores_BP"):
        choose_pairs("hardest", num_views=4, num_images=2, device=CPU)
    with pytest.raises(ShapeError, match=r"\(2, 6\)"):
        choose_pairs("hardest", num_views=4, num_images=2, device=CPU, scores_BP=torch.zeros(2, 3))


def test_gather_equals_a_loop(generator: np.random.Generator) -> None:
    pixels = torch.from_numpy(generator.integers(0, 256, (4, 5, 3, 3, 3), dtype=np.uint8))
    indices = torch.from_numpy(generator.integers(0, 4, (2, 5)))
    gathered = gather_views(pixels, indices)
    for slot in range(2):
        for image in range(5):
            assert torch.equal(gathered[slot, image], pixels[indices[slot, image], image])
