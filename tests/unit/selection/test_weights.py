"""Weights of pairs: each weighting against its definition, and what no weighting may change."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hvp_ray.config import SelectionConfig
from hvp_ray.errors import ConfigError
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import WEIGHTINGS, Candidates, PairWeighting, pair_table, pair_weights_of
from hvp_ray.selection.weights import effective_pairs, matching_table, mean_of_pairs

CPU = torch.device("cpu")
HARD = [name for name in WEIGHTINGS if name != "mean"]


def _weighting(
    name: str, num_views: int, *, alternating: bool = False, ramp_position: float = 1.0, **settings: Any
) -> PairWeighting:
    top_k = settings.pop("weight_top_k", 2 if name == "top_k" else None)
    selection = SelectionConfig(rule="all_pairs", num_views=num_views, weighting=name, weight_top_k=top_k, **settings)
    weigh = pair_weights_of(
        selection, Candidates(num_views=num_views, alternating=alternating), device=CPU, ramp_position=ramp_position
    )
    assert weigh is not None
    return weigh


def _slow_hardest_matching(losses: dict[frozenset[int], float], num_views: int) -> set[frozenset[int]]:
    """Try every order of the views, cut into pairs."""
    best, found = -math.inf, set()
    for order in itertools.permutations(range(num_views)):
        pairs = {frozenset(order[i : i + 2]) for i in range(0, num_views, 2)}
        if pairs <= losses.keys() and sum(losses[pair] for pair in pairs) > best:
            best, found = sum(losses[pair] for pair in pairs), pairs
    return found


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("num_views", [4, 6])
def test_matching_is_the_hardest_of_all_that_have_every_view_once(
    num_views: int, alternating: bool, generator: np.random.Generator
) -> None:
    pairs = [frozenset(pair) for pair in pair_table(num_views, alternating=alternating).tolist()]
    losses_BP = torch.from_numpy(generator.normal(size=(5, len(pairs))))
    weights_BP = _weighting("matching", num_views, alternating=alternating)(losses_BP)
    for losses, weights in zip(losses_BP.tolist(), weights_BP.tolist(), strict=True):
        hardest = _slow_hardest_matching(dict(zip(pairs, losses, strict=True)), num_views)
        assert weights == pytest.approx([2 / num_views * (pair in hardest) for pair in pairs])


def test_matchings_are_all_and_have_every_view_once() -> None:
    for num_views, number in ((2, 1), (4, 3), (6, 15), (8, 105)):
        for alternating, expected in ((False, number), (True, math.factorial(num_views // 2))):
            table = matching_table(num_views, alternating=alternating)
            views = pair_table(num_views, alternating=alternating)[table].reshape(len(table), -1)
            assert len({frozenset(row) for row in table.tolist()}) == len(table) == expected
            assert (np.sort(views, axis=1) == np.arange(num_views)).all()


def test_softmax_of_a_hand_computed_image() -> None:
    """Losses 0, 1, 2 have the standard deviation sqrt(2/3); scale and offset of the losses do not matter."""
    weights = np.exp(np.array([0, 1, 2]) / (0.5 * math.sqrt(2 / 3)))
    expected = torch.from_numpy(weights / weights.sum())[None]
    weigh = _weighting("softmax", 3, weight_temperature=0.5)
    losses_BP = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    for same in (losses_BP, 1e-3 * losses_BP - 7, 1e4 * losses_BP):
        torch.testing.assert_close(weigh(same), expected, rtol=1e-6, atol=0)


def test_equal_losses_have_equal_softmax_weights_and_nearly_equal_ones_finite_ones() -> None:
    weigh = _weighting("softmax", 4)
    for value in (0.0, 0.1, -0.97, 9.3):
        equal = torch.full((2, 6), value)
        torch.testing.assert_close(weigh(equal), torch.full((2, 6), 1 / 6))
        above = torch.nextafter(equal, torch.tensor(math.inf))
        weights_BP = weigh(torch.cat([equal[:, :5], above[:, 5:]], dim=1))
        assert torch.isfinite(weights_BP).all()
        torch.testing.assert_close(weights_BP.sum(dim=1), torch.ones(2))


def test_temperature_leads_from_the_hardest_pair_to_the_mean(generator: np.random.Generator) -> None:
    losses_BP = torch.from_numpy(generator.normal(size=(6, 15)))
    coldest = _weighting("softmax", 6, weight_temperature=1e-4)(losses_BP)
    assert torch.equal(coldest, torch.nn.functional.one_hot(losses_BP.argmax(dim=1), 15).double())
    torch.testing.assert_close(_weighting("top_k", 6, weight_top_k=1)(losses_BP), coldest)
    warmest = _weighting("softmax", 6, weight_temperature=1e6)(losses_BP)
    torch.testing.assert_close(warmest, torch.full((6, 15), 1 / 15).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(_weighting("top_k", 6, weight_top_k=15)(losses_BP), torch.full((6, 15), 1 / 15).double())


def test_top_k_and_partners_of_a_hand_computed_image() -> None:
    """Pairs 01 02 03 12 13 23. Views 0 and 1 are hardest with each other, 2 with 0, 3 with 1."""
    losses_BP = torch.tensor([[9.0, 5.0, 1.0, 4.0, 6.0, 2.0]])
    assert _weighting("top_k", 4, weight_top_k=3)(losses_BP)[0].tolist() == pytest.approx(
        [1 / 3, 1 / 3, 0, 0, 1 / 3, 0]
    )
    assert _weighting("partner", 4)(losses_BP)[0].tolist() == pytest.approx([2 / 4, 1 / 4, 0, 0, 1 / 4, 0])


@pytest.mark.parametrize("alternating", [False, True])
def test_partners_are_those_of_a_loop_over_the_views(alternating: bool, generator: np.random.Generator) -> None:
    pairs = pair_table(5, alternating=alternating).tolist()
    losses_BP = torch.from_numpy(generator.normal(size=(7, len(pairs))))
    weights_BP = _weighting("partner", 5, alternating=alternating)(losses_BP)
    for losses, weights in zip(losses_BP.tolist(), weights_BP.tolist(), strict=True):
        expected = [0.0] * len(pairs)
        for view in range(5):
            mine = [row for row, pair in enumerate(pairs) if view in pair]
            expected[max(mine, key=lambda row: losses[row])] += 1 / 5
        assert weights == pytest.approx(expected)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize(("num_views", "alternating"), [(4, False), (6, False), (4, True), (8, True)])
def test_weights_sum_to_1_and_move_with_the_views(
    name: str, num_views: int, alternating: bool, generator: np.random.Generator
) -> None:
    """Views are permuted within their transforms, if pairs keep those."""
    pairs = [frozenset(pair) for pair in pair_table(num_views, alternating=alternating).tolist()]
    losses_BP = torch.from_numpy(generator.normal(size=(9, len(pairs))))
    weigh = _weighting(name, num_views, alternating=alternating)
    weights_BP = weigh(losses_BP)
    torch.testing.assert_close(weights_BP.sum(dim=1), torch.ones(9).double())
    assert (weights_BP >= 0).all()
    order = generator.permutation(num_views)
    if alternating:
        order[::2], order[1::2] = (
            2 * generator.permutation(num_views // 2),
            2 * generator.permutation(num_views // 2) + 1,
        )
    columns = [pairs.index(frozenset(order[list(pair)].tolist())) for pair in pairs]
    torch.testing.assert_close(weigh(losses_BP[:, columns]), weights_BP[:, columns])
    torch.testing.assert_close(weigh(losses_BP[3:4]), weights_BP[3:4])  # other images have no say


@pytest.mark.parametrize("name", HARD)
def test_dial_blends_from_the_mean_to_the_weighting(name: str, generator: np.random.Generator) -> None:
    losses_BP = torch.from_numpy(generator.normal(size=(3, 6)))
    full = _weighting(name, 4)(losses_BP)
    torch.testing.assert_close(_weighting(name, 4, ramp_position=0.25)(losses_BP), 0.75 / 6 + 0.25 * full)
    assert torch.equal(_weighting(name, 4, ramp_position=1.0)(losses_BP), full)


def test_mean_needs_no_weights() -> None:
    """At ramp_position 0, with equal weights, and with two views, the loss is the plain mean to the bit."""
    softmax = SelectionConfig(rule="all_pairs", weighting="softmax")
    mean = dataclasses.replace(softmax, weighting="mean")
    four, two = Candidates(num_views=4), Candidates(num_views=2)
    for selection, candidates, ramp_position in ((softmax, four, 0.0), (mean, four, 1.0), (softmax, two, 1.0)):
        assert pair_weights_of(selection, candidates, device=CPU, ramp_position=ramp_position) is None
    values_BP = torch.randn(5, 6)
    assert torch.equal(mean_of_pairs(values_BP, None), values_BP.mean())
    torch.testing.assert_close(mean_of_pairs(values_BP, torch.full((5, 6), 1 / 6)), values_BP.mean())


@pytest.mark.parametrize("name", HARD)
def test_weights_have_no_gradient_and_read_no_values(name: str) -> None:
    """A fake tensor has no values: a copy to the host would raise."""
    weigh = _weighting(name, 4)
    assert not weigh(torch.randn(2, 6, requires_grad=True)).requires_grad
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert weigh(torch.empty(2, 6)).shape == (2, 6)


def test_effective_pairs_counts_pairs() -> None:
    losses_BP = torch.randn(4, 6)
    for weigh, expected in (
        (_weighting("top_k", 4, weight_top_k=3), 3),
        (_weighting("matching", 4), 2),
        (_weighting("softmax", 4, weight_temperature=1e-6), 1),
        (_weighting("softmax", 4, weight_temperature=1e6), 6),
    ):
        assert float(effective_pairs(weigh(losses_BP))) == pytest.approx(expected, rel=1e-4)
    assert float(effective_pairs(torch.tensor([[0.5, 0.5, 0.0]]))) == pytest.approx(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "softmax"}, "selection.weighting='softmax' is not allowed: mean with selection.rule=hardest"),
        ({"rule": "all_pairs", "weighting": "top_k"}, "weight_top_k=None is not allowed: a number"),
        ({"rule": "all_pairs", "weight_top_k": 2}, "None with the others"),
        ({"rule": "all_pairs", "weighting": "top_k", "weight_top_k": 7}, "at most the 6 pairs of 4 views"),
        ({"rule": "all_pairs", "weighting": "matching", "num_views": 5}, "an even number of at most 8 views"),
        ({"rule": "all_pairs", "weighting": "matching", "num_views": 10}, "an even number of at most 8 views"),
        ({"rule": "all_pairs", "weighting": "softmax", "weight_temperature": 0.0}, "above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    config = get_recipe("simsiam-digits")
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, selection=dataclasses.replace(config.selection, **settings))


def test_pairs_that_keep_their_transforms_bound_top_k_and_an_averaged_target_has_no_pairs() -> None:
    config = get_recipe("simsiam-digits")
    groups = config.views.global_views
    views = dataclasses.replace(config.views, global_views=dataclasses.replace(groups, odd=groups.even))
    top_k = {"rule": "all_pairs", "weighting": "top_k", "weight_top_k": 5}
    with pytest.raises(ConfigError, match="at most the 4 pairs of 4 views"):
        dataclasses.replace(config, views=views, selection=dataclasses.replace(config.selection, **top_k))
    method = dataclasses.replace(config.method, averaged_target=True)
    with pytest.raises(ConfigError, match="mean with method.averaged_target=True"):
        dataclasses.replace(config, method=method, selection=dataclasses.replace(config.selection, **top_k))
