"""Candidates, rules and gather against slow loops."""

import dataclasses
import itertools
from typing import get_args

import numpy as np
import pytest
import torch

from hvp_ray.config import Rule, TransformConfig, ViewGroupConfig
from hvp_ray.errors import ShapeError
from hvp_ray.methods.simsiam import score_pairs
from hvp_ray.randomness import Purpose, draw_stream, draw_words
from hvp_ray.records import ViewPlan
from hvp_ray.selection import (
    RULES,
    Candidates,
    CandidateScores,
    Draw,
    Selection,
    choose_views,
    gather_views,
    pair_table,
)
from hvp_ray.views.geometry import crop_iou
from hvp_ray.views.plan import draw_plan
from tests.helpers import slow_hardest_pairs

CPU = torch.device("cpu")
MULTI_CROP = Candidates(num_views=4, num_local_views=6, num_chosen_local_views=3, alternating=True)


def _draw(num_images: int = 20, *, seed: int = 3, step: int = 5, rank: int = 0) -> Draw:
    return Draw(seed=seed, step=step, rank=rank, epoch=2, sample_ids=np.arange(num_images) * 7 + 1)


def _plan(num_images: int) -> ViewPlan:
    sizes = np.full(num_images, 64, np.int32)
    return draw_plan(
        seed=0,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(num_images),
        image_sizes=(sizes, sizes),
        num_views=4,
        group=ViewGroupConfig(size_px=16, even=TransformConfig()),
    )


def _choose(rule: Rule, scores: torch.Tensor, num_views: int = 4) -> np.ndarray:
    selection = choose_views(
        rule,
        Candidates(num_views=num_views),
        num_images=len(scores),
        device=CPU,
        scores=CandidateScores(pairs_BP=scores),
    )
    return selection.view_indices.numpy()


def test_table_of_rules_is_that_of_the_config() -> None:
    assert set(RULES) == set(get_args(Rule))


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
def test_best_tuple_equals_brute_force(rule: Rule, best, alternating: bool, generator: np.random.Generator) -> None:
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


def _drawn_tuples(draw: Draw, limit: int) -> list[tuple[int, tuple[int, ...]]]:
    """Draw the candidates of a limited search, one after the other: a word for the pair, six for the local views."""
    words = draw_stream(
        seed=draw.seed, purpose=Purpose.CANDIDATES, index=draw.rank, epoch=draw.step, num_words=7 * limit
    )
    drawn = []
    for of_pair, *of_locals in words.reshape(limit, 7).tolist():
        smallest = sorted(range(6), key=lambda view, of_locals=of_locals: of_locals[view])[:3]
        drawn.append((of_pair % 4, tuple(sorted(smallest))))
    return drawn


@pytest.mark.parametrize(("rule", "best"), [("hardest", max), ("easiest", min)])
def test_limited_search_equals_brute_force_over_the_drawn_tuples(
    rule: Rule, best, generator: np.random.Generator
) -> None:
    scores, draw = _random_scores(MULTI_CROP, 20, generator), _draw()
    tuples = _drawn_tuples(draw, 9)
    assert set(tuples) <= set(_every_tuple(MULTI_CROP))
    limited = dataclasses.replace(MULTI_CROP, limit=9)
    selection = choose_views(rule, limited, num_images=20, device=CPU, scores=scores, draw=draw)
    exact = choose_views(rule, MULTI_CROP, num_images=20, device=CPU, scores=scores)
    assert selection.pair_indices is not None
    assert selection.local_indices is not None
    assert selection.scores is not None
    assert exact.scores is not None
    for image in range(20):
        expected = best(tuples, key=lambda t: _score_of(scores, image, *t))
        chosen = (int(selection.pair_indices[image]), tuple(selection.local_indices[:, image].tolist()))
        assert chosen == expected
        assert float(selection.scores[image]) == pytest.approx(_score_of(scores, image, *expected))
    assert not torch.equal(exact.scores, selection.scores)


def test_limited_search_is_addressed_and_a_large_limit_is_the_exact_search(generator: np.random.Generator) -> None:
    scores = _random_scores(MULTI_CROP, 20, generator)

    def chosen(limit: int | None, draw: Draw | None) -> torch.Tensor:
        candidates = dataclasses.replace(MULTI_CROP, limit=limit)
        selection = choose_views("hardest", candidates, num_images=20, device=CPU, scores=scores, draw=draw)
        assert selection.scores is not None
        return selection.scores

    assert torch.equal(chosen(8, _draw()), chosen(8, _draw()))
    for other in (_draw(seed=1), _draw(step=1), _draw(rank=1)):
        assert not torch.equal(chosen(8, _draw()), chosen(8, other))
    assert torch.equal(chosen(MULTI_CROP.count, None), chosen(None, None))
    with pytest.raises(ShapeError, match="the draw of B = 20 images, got None"):
        chosen(MULTI_CROP.count - 1, None)
    pairs = [pair for pair, _ in _drawn_tuples(_draw(), MULTI_CROP.count - 1)]
    assert np.bincount(pairs, minlength=4).min() > 5  # uniform: 79 draws of 4 pairs


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


def test_first_takes_views_0_and_1() -> None:
    first = choose_views("first", Candidates(num_views=4), num_images=3, device=CPU)
    assert first.view_indices.T.tolist() == [[0, 1]] * 3


def test_random_takes_the_addressed_words_of_each_image() -> None:
    draw = _draw(5)
    selection = choose_views("random", MULTI_CROP, num_images=5, device=CPU, draw=draw)
    assert selection.local_indices is not None
    for image, sample_id in enumerate(draw.sample_ids):
        address = {"seed": 3, "sample_ids": np.array([sample_id]), "epoch": 2}
        pair = int(draw_words(purpose=Purpose.RANDOM_PAIR, num_words=1, **address)[0, 0]) % 4
        words = draw_words(purpose=Purpose.RANDOM_LOCALS, num_words=6, **address)[0].tolist()
        assert selection.view_indices[:, image].tolist() == MULTI_CROP.pairs[pair].tolist()
        assert selection.local_indices[:, image].tolist() == sorted(sorted(range(6), key=words.__getitem__)[:3])
    with pytest.raises(ShapeError, match="the draw of B = 5 images, got None"):
        choose_views("random", MULTI_CROP, num_images=5, device=CPU)


def test_min_iou_takes_the_least_overlap() -> None:
    plan, pairs = _plan(30), pair_table(4)
    selection = choose_views("min_iou", Candidates(num_views=4), num_images=30, device=CPU, plan=plan)
    ious = crop_iou(plan.top, plan.left, plan.height, plan.width, pairs)
    for image, chosen in enumerate(selection.view_indices.T.tolist()):
        assert chosen == pairs[int(ious[image].argmin())].tolist()
    with pytest.raises(ShapeError, match=r"\(4, 30\) views, got None"):
        choose_views("min_iou", Candidates(num_views=4), num_images=30, device=CPU)


def test_all_pairs_takes_every_view() -> None:
    selection: Selection = choose_views("all_pairs", MULTI_CROP, num_images=2, device=CPU)
    assert selection.pair_indices is None
    assert selection.view_indices.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert selection.local_indices is not None
    assert selection.local_indices.tolist() == [[view, view] for view in range(6)]


@pytest.mark.parametrize("rule", get_args(Rule))
def test_rules_choose_as_many_views_as_they_say(rule: Rule, generator: np.random.Generator) -> None:
    scores = _random_scores(MULTI_CROP, 7, generator) if RULES[rule].needs_scores else None
    selection = choose_views(rule, MULTI_CROP, num_images=7, device=CPU, scores=scores, plan=_plan(7), draw=_draw(7))
    assert selection.local_indices is not None
    assert (len(selection.view_indices), len(selection.local_indices)) == RULES[rule].num_trained_views(MULTI_CROP)


@pytest.mark.parametrize("rule", [rule for rule in get_args(Rule) if RULES[rule].needs_scores])
@pytest.mark.parametrize("limit", [None, 9])
def test_rules_that_read_scores_read_those_of_local_views_and_keep_to_the_limit(
    rule: Rule, limit: int | None, generator: np.random.Generator
) -> None:
    """Properties of every rule, also of a new one: the score is that of the chosen tuple, which the limit allows."""
    scores, draw = _random_scores(MULTI_CROP, 20, generator), _draw()
    allowed = set(_every_tuple(MULTI_CROP) if limit is None else _drawn_tuples(draw, limit))
    candidates = dataclasses.replace(MULTI_CROP, limit=limit)
    selection = choose_views(rule, candidates, num_images=20, device=CPU, scores=scores, plan=_plan(20), draw=draw)
    assert selection.pair_indices is not None and selection.local_indices is not None and selection.scores is not None
    for image, score in enumerate(selection.scores.tolist()):
        chosen = (int(selection.pair_indices[image]), tuple(selection.local_indices[:, image].tolist()))
        assert chosen in allowed
        assert score == pytest.approx(_score_of(scores, image, *chosen))
    # Other scores of local views, with the same scores of pairs, lead to other choices.
    flipped = dataclasses.replace(scores, locals_BPL=-scores.locals_BPL)
    other = choose_views(rule, candidates, num_images=20, device=CPU, scores=flipped, plan=_plan(20), draw=draw)
    assert other.local_indices is not None and not torch.equal(selection.local_indices, other.local_indices)


def test_missing_or_misshapen_scores_are_refused() -> None:
    with pytest.raises(ShapeError, match="pairs_BP"):
        choose_views("hardest", Candidates(num_views=4), num_images=2, device=CPU)
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
