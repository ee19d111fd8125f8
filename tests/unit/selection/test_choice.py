"""Candidates, choice and gather against slow loops."""

import itertools

import numpy as np
import pytest
import torch

from hvp_ray.errors import ShapeError
from hvp_ray.methods.simsiam import score_pairs
from hvp_ray.selection import (
    Candidates,
    CandidateScores,
    DrawnCandidates,
    Selection,
    choose_views,
    gather_views,
    pair_table,
)
from hvp_ray.training.choosing import draw_candidates
from tests.helpers import slow_hardest_pairs

CPU = torch.device("cpu")
MULTI_CROP = Candidates(num_views=4, num_local_views=6, num_chosen_local_views=3, alternating=True)


def _choose(rule: str, scores: torch.Tensor | None = None, num_views: int = 4, **options: torch.Tensor) -> np.ndarray:
    num_images = len(next(v for v in (scores, *options.values(), torch.zeros(3)) if v is not None))
    selection = choose_views(
        rule,
        Candidates(num_views=num_views),
        num_images=num_images,
        device=CPU,
        scores=None if scores is None else CandidateScores(pairs_BP=scores),
        **options,
    )
    return selection.view_indices.numpy()


def test_pair_table_is_lexicographic() -> None:
    assert pair_table(4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert pair_table(8).shape == (28, 2)
    with pytest.raises(ShapeError):
        pair_table(1)


def test_alternating_pairs_have_an_even_view_first_and_an_odd_one_second() -> None:
    assert pair_table(4, alternating=True).tolist() == [[0, 1], [0, 3], [2, 1], [2, 3]]
    assert pair_table(5, alternating=True).tolist() == [[0, 1], [0, 3], [2, 1], [2, 3], [4, 1], [4, 3]]


def test_candidates_are_counted_as_in_the_paper() -> None:
    counts = {
        (4, 16, 8): 51_480,
        (4, 16, 10): 32_032,
        (2, 8, 8): 1,
    }
    for (num_views, num_locals, chosen), count in counts.items():
        candidates = Candidates(
            num_views=num_views, num_local_views=num_locals, num_chosen_local_views=chosen, alternating=True
        )
        assert candidates.count == count
    assert Candidates(num_views=4).count == 6


def test_hardest_pairs_equal_the_papers_loop_on_64_images(generator: np.random.Generator) -> None:
    projections, predictions = generator.normal(size=(2, 4, 64, 16))
    scores = score_pairs(
        torch.from_numpy(projections).float(), torch.from_numpy(predictions).float(), torch.from_numpy(pair_table(4))
    )
    chosen = _choose("hardest", scores).T
    assert [tuple(pair) for pair in chosen.tolist()] == slow_hardest_pairs(projections, predictions)


def test_hardest_and_easiest_are_argmax_and_argmin_and_ties_go_to_the_lowest_pair() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.2, 0.1, 0.3], [0.5] * 6])
    assert _choose("hardest", scores).T.tolist() == [[0, 2], [0, 1]]
    assert _choose("easiest", scores).T.tolist() == [[0, 1], [0, 1]]


def _random_scores(candidates: Candidates, num_images: int, generator: np.random.Generator) -> CandidateScores:
    shape = (num_images, len(candidates.pairs), candidates.num_local_views)
    return CandidateScores(
        pairs_BP=torch.from_numpy(generator.normal(size=shape[:2])),
        locals_BPL=torch.from_numpy(generator.normal(size=shape)),
    )


def _every_tuple(candidates: Candidates) -> list[tuple[int, tuple[int, ...]]]:
    subsets = list(itertools.combinations(range(candidates.num_local_views), candidates.num_chosen_local_views))
    return list(itertools.product(range(len(candidates.pairs)), subsets))


def _score_of(scores: CandidateScores, image: int, pair: int, of_locals: tuple[int, ...]) -> float:
    assert scores.locals_BPL is not None
    return float(scores.pairs_BP[image, pair]) + sum(float(scores.locals_BPL[image, pair, v]) for v in of_locals)


@pytest.mark.parametrize("alternating", [True, False])
@pytest.mark.parametrize(("rule", "best"), [("hardest", max), ("easiest", min)])
def test_best_tuple_equals_brute_force(rule: str, best, alternating: bool, generator: np.random.Generator) -> None:
    candidates = Candidates(num_views=4, num_local_views=6, num_chosen_local_views=3, alternating=alternating)
    scores = _random_scores(candidates, 20, generator)
    selection = choose_views(rule, candidates, num_images=20, device=CPU, scores=scores)
    assert selection.pair_indices is not None
    assert selection.local_indices is not None
    assert selection.scores is not None
    for image in range(20):
        expected = best(_every_tuple(candidates), key=lambda t: _score_of(scores, image, *t))
        chosen = (int(selection.pair_indices[image]), tuple(selection.local_indices[:, image].tolist()))
        assert chosen == expected
        assert float(selection.scores[image]) == pytest.approx(_score_of(scores, image, *expected))
        assert selection.view_indices[:, image].tolist() == candidates.pairs[expected[0]].tolist()


def test_limited_search_equals_brute_force_over_the_drawn_tuples(generator: np.random.Generator) -> None:
    scores = _random_scores(MULTI_CROP, 20, generator)
    drawn = draw_candidates(MULTI_CROP, 9, seed=3, step=5, rank=0)
    assert drawn is not None
    tuples = [(int(p), tuple(v.tolist())) for p, v in zip(drawn.pair_indices, drawn.local_indices, strict=True)]
    assert set(tuples) <= set(_every_tuple(MULTI_CROP))
    selection = choose_views("hardest", MULTI_CROP, num_images=20, device=CPU, scores=scores, drawn=drawn)
    exact = choose_views("hardest", MULTI_CROP, num_images=20, device=CPU, scores=scores)
    assert selection.scores is not None
    assert exact.scores is not None
    for image in range(20):
        best = max(_score_of(scores, image, *t) for t in tuples)
        assert float(selection.scores[image]) == pytest.approx(best)
    assert (exact.scores >= selection.scores).all()
    assert (exact.scores > selection.scores).any()


def test_drawn_candidates_are_addressed_and_a_large_limit_is_the_exact_search() -> None:
    def drawn(limit: int | None = 8, seed: int = 0, step: int = 0, rank: int = 0) -> DrawnCandidates | None:
        return draw_candidates(MULTI_CROP, limit, seed=seed, step=step, rank=rank)

    first, again = drawn(), drawn()
    assert first is not None
    assert again is not None
    assert np.array_equal(first.local_indices, again.local_indices)
    for other in (drawn(seed=1), drawn(step=1), drawn(rank=1)):
        assert other is not None
        assert not np.array_equal(first.local_indices, other.local_indices)
    assert drawn(None) is None
    assert drawn(MULTI_CROP.count) is None
    many = drawn(MULTI_CROP.count - 1)
    assert many is not None
    assert np.bincount(many.pair_indices, minlength=4).min() > 5  # uniform: 79 draws of 4 pairs


def test_one_candidate_is_the_vanilla_choice(generator: np.random.Generator) -> None:
    candidates = Candidates(num_views=2, num_local_views=5, num_chosen_local_views=5, alternating=True)
    scores = _random_scores(candidates, 7, generator)
    hardest = choose_views("hardest", candidates, num_images=7, device=CPU, scores=scores)
    first = choose_views("first", candidates, num_images=7, device=CPU)
    assert torch.equal(hardest.view_indices, first.view_indices)
    assert hardest.local_indices is not None
    assert first.local_indices is not None
    assert torch.equal(hardest.local_indices, first.local_indices)
    assert first.local_indices[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_mean_score_is_that_of_all_tuples(generator: np.random.Generator) -> None:
    scores = _random_scores(MULTI_CROP, 4, generator)
    for image, mean in enumerate(scores.mean(3).tolist()):
        everything = [_score_of(scores, image, *t) for t in _every_tuple(MULTI_CROP)]
        assert mean == pytest.approx(float(np.mean(everything)))


def test_first_takes_views_0_and_1_and_random_takes_what_was_drawn() -> None:
    assert _choose("first").T.tolist() == [[0, 1]] * 3
    assert _choose("random", random_pairs=torch.tensor([5, 0, 3])).T.tolist() == [[2, 3], [0, 1], [1, 2]]
    of_locals = torch.tensor([[0, 3], [2, 4], [5, 5]])
    selection = choose_views(
        "random", MULTI_CROP, num_images=2, device=CPU, random_pairs=torch.tensor([1, 2]), random_locals=of_locals
    )
    assert selection.view_indices.T.tolist() == [[0, 3], [2, 1]]
    assert selection.local_indices is of_locals


def test_min_iou_takes_the_least_overlap() -> None:
    ious = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1, 0.6]])
    assert _choose("min_iou", iou_BP=ious).T.tolist() == [[1, 3]]


def test_all_pairs_takes_every_view() -> None:
    assert _choose("all_pairs", num_views=3).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    selection: Selection = choose_views("all_pairs", MULTI_CROP, num_images=2, device=CPU)
    assert selection.local_indices is not None
    assert selection.local_indices.shape == (6, 2)


def test_missing_or_misshapen_scores_are_refused() -> None:
    with pytest.raises(ShapeError, match="pairs_BP"):
        _choose("hardest")
    with pytest.raises(ShapeError, match=r"\(2, 6\)"):
        _choose("hardest", torch.zeros(2, 3))
    pairs_only = CandidateScores(pairs_BP=torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="locals_BPL"):
        choose_views("hardest", MULTI_CROP, num_images=2, device=CPU, scores=pairs_only)
    with pytest.raises(ShapeError, match="num_chosen_local_views=3"):
        Candidates(num_views=2, num_local_views=2, num_chosen_local_views=3)


def test_gather_equals_a_loop(generator: np.random.Generator) -> None:
    pixels = torch.from_numpy(generator.integers(0, 256, (4, 5, 3, 3, 3), dtype=np.uint8))
    indices = torch.from_numpy(generator.integers(0, 4, (2, 5)))
    gathered = gather_views(pixels, indices)
    for slot in range(2):
        for image in range(5):
            assert torch.equal(gathered[slot, image], pixels[indices[slot, image], image])
