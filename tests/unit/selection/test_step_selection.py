"""The schedule of hard views: which steps are hard, how hard, and what they render."""

import numpy as np
import pytest
import torch

from hvp_ray.config import SelectionConfig
from hvp_ray.selection import Candidates, CandidateScores, choose_views, hard_step, selection_at, vanilla_step

CPU = torch.device("cpu")


def _hard(selection: SelectionConfig, num_steps: int) -> list[int]:
    return [step for step in range(num_steps) if selection_at(selection, step, num_steps).is_hard]


def test_hard_steps_follow_every_and_start() -> None:
    assert _hard(SelectionConfig(every=3), 8) == [0, 3, 6]
    assert _hard(SelectionConfig(start_fraction=0.5), 8) == [4, 5, 6, 7]
    assert _hard(SelectionConfig(start_fraction=0.5, every=3), 10) == [6, 9]
    assert _hard(SelectionConfig(rule="first"), 8) == []
    assert _hard(SelectionConfig(start_fraction=1.0), 8) == []


def test_vanilla_steps_render_what_they_train_on() -> None:
    selection = SelectionConfig(every=3)
    assert [selection_at(selection, step, 4).num_views for step in range(4)] == [4, 2, 2, 4]
    crops = SelectionConfig(num_views=None, num_global_views=4, num_local_views=16, num_chosen_local_views=4, every=2)
    rendered = [(of_step.num_views, of_step.num_local_views) for of_step in (hard_step(crops), vanilla_step(crops))]
    assert rendered == [(4, 16), (2, 4)]


def test_score_always_renders_and_scores_the_candidates_of_vanilla_steps_too() -> None:
    of_step = selection_at(SelectionConfig(rule="first", score_always=True), 0, 1)
    assert (of_step.num_views, of_step.needs_scores, of_step.rule) == (4, True, "first")


def test_the_ramp_is_a_line_from_its_quantile_to_the_full_one() -> None:
    selection = SelectionConfig(start_fraction=0.2, ramp_fraction=0.4, ramp_from=0.5, quantile=0.9)
    of_steps = [selection_at(selection, step, 100) for step in range(100)]
    assert not any(of_step.is_hard for of_step in of_steps[:20])
    np.testing.assert_allclose(
        [of_step.quantile for of_step in of_steps[20:]],
        np.interp(np.arange(20, 100), [20, 60], [0.5, 0.9]),
        rtol=1e-12,
    )
    assert of_steps[-1] == hard_step(selection)


def test_all_pairs_are_trained_on_from_the_first_step_and_only_the_dial_waits() -> None:
    selection = SelectionConfig(rule="all_pairs", weighting="softmax", start_fraction=0.5)
    of_steps = [selection_at(selection, step, 4) for step in range(4)]
    assert [(of_step.is_hard, of_step.ramp_position) for of_step in of_steps] == [
        (True, 0),
        (True, 0),
        (True, 1),
        (True, 1),
    ]


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.4, 0.5, 0.9, 1.0])
def test_a_quantile_is_the_place_in_the_order_of_the_candidates(quantile: float) -> None:
    """Against numpy's order: without local views every candidate is listed."""
    candidates = Candidates(num_views=4)
    scores_BP = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    chosen = choose_views(
        "hardest",
        candidates,
        num_images=32,
        device=CPU,
        quantile=quantile,
        scores=CandidateScores(pairs_BP=scores_BP),
    )
    expected = np.sort(scores_BP.numpy(), axis=1)[:, 5 - round((1 - quantile) * 5)]
    assert chosen.scores is not None and chosen.pair_indices is not None
    np.testing.assert_array_equal(chosen.scores.numpy(), expected)
    np.testing.assert_array_equal(scores_BP[torch.arange(32), chosen.pair_indices].numpy(), expected)


def test_with_local_views_the_ends_of_the_quantile_are_the_hardest_and_the_easiest_and_between_it_rises() -> None:
    candidates = Candidates(num_views=4, num_local_views=6, num_chosen_local_views=2)
    generator = torch.Generator().manual_seed(0)
    scores = CandidateScores(
        pairs_BP=torch.randn(16, 6, generator=generator), locals_BPL=torch.randn(16, 6, 6, generator=generator)
    )

    def choose(rule: str, quantile: float = 1.0):  # type: ignore[no-untyped-def]
        return choose_views(rule, candidates, num_images=16, device=CPU, quantile=quantile, scores=scores)  # type: ignore[arg-type]

    for quantile, rule in ((1.0, "hardest"), (0.0, "easiest")):
        at_end, by_rule = choose("hardest", quantile), choose(rule)
        assert torch.equal(at_end.pair_indices, by_rule.pair_indices)
        assert torch.equal(at_end.local_indices, by_rule.local_indices)
    of_quantiles = torch.stack([choose("hardest", quantile / 10).scores for quantile in range(11)])
    assert (of_quantiles.diff(dim=0) >= 0).all()


def test_with_two_global_views_only_the_local_views_are_chosen() -> None:
    """The knob "locals only" is `num_global_views=2`: the pair is fixed, and its k hardest local views are found."""
    selection = SelectionConfig(num_views=None, num_global_views=2, num_local_views=5, num_chosen_local_views=2)
    of_step = hard_step(selection)
    candidates = Candidates(num_views=2, num_local_views=5, num_chosen_local_views=2)
    assert (of_step.num_views, of_step.num_local_views, candidates.count) == (2, 5, 10)
    locals_BPL = torch.tensor([[[0.1, 0.9, 0.3, 0.8, 0.2]], [[5.0, 1.0, 4.0, 2.0, 3.0]]])
    scores = CandidateScores(pairs_BP=torch.zeros(2, 1), locals_BPL=locals_BPL)
    chosen = choose_views("hardest", candidates, num_images=2, device=CPU, scores=scores)
    assert chosen.local_indices is not None and chosen.local_indices.T.tolist() == [[1, 3], [0, 2]]
