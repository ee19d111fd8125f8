"""Operations of a step are counted for the rule that it follows."""

import dataclasses
from typing import Any

import pytest

from hvp_ray.config import RunConfig
from hvp_ray.costs.operations import count_operations, operations_of_step
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import hard_step, vanilla_step


def _with(config: RunConfig, **selection: Any) -> RunConfig:
    return dataclasses.replace(config, selection=dataclasses.replace(config.selection, **selection))


def _count(config: RunConfig) -> int:
    return operations_of_step(config, hard_step(config.selection))


@pytest.mark.parametrize("recipe", ["simsiam-digits", "simclr-digits"])
def test_all_pairs_of_v_views_cost_v_halves_of_a_random_step(recipe: str) -> None:
    config = _with(get_recipe(recipe), rule="all_pairs")
    random = operations_of_step(config, vanilla_step(config.selection))
    for num_views in (2, 4, 6):
        assert _count(_with(config, num_views=num_views)) == pytest.approx(num_views / 2 * random, rel=0.02)
    weighted = _with(config, weighting="softmax")
    assert _count(weighted) == pytest.approx(_count(config), rel=1e-3)
    assert count_operations(weighted) == count_operations(_with(config, rule="hardest"))


@pytest.mark.parametrize(("recipe", "views"), [("simclr-digits", "num_views"), ("ibot-digits", "num_global_views")])
def test_rescue_costs_its_share_of_the_other_views(recipe: str, views: str) -> None:
    """As `benchmarks/hardness.py` prices it."""
    config = _with(get_recipe(recipe), rule="hardest")
    two, everything = (_count(_with(config, **{views: number})) for number in (2, 4))
    config = _with(config, **{views: 4})
    for share in (0.25, 0.5):
        expected = two + share * (everything - two)
        assert _count(_with(config, rescue_share=share)) == pytest.approx(expected, rel=0.01)
    rescue = count_operations(_with(config, rescue_share=0.5))
    assert rescue.random_step + rescue.scoring == _count(_with(config, rescue_share=0.5))


@pytest.mark.parametrize("recipe", ["simsiam-digits", "dino-digits"])
def test_rules_that_do_not_score_cost_a_random_step(recipe: str) -> None:
    config = get_recipe(recipe)
    hardest = count_operations(_with(config, rule="hardest"))
    for rule in ("random", "min_iou"):
        assert count_operations(_with(config, rule=rule)).ratio == 1.0
        scored = count_operations(_with(config, rule=rule, score_always=True))
        assert scored == hardest, "the control batch-norm"
    assert count_operations(_with(config, rule="easiest")) == hardest
    for rule in ("first", "all_pairs"):
        assert count_operations(_with(config, rule=rule)) == hardest, "what a hard step would cost"


def test_elastic_runs_are_counted_and_measured_as_one_trainers_largest_share() -> None:
    config = get_recipe("simsiam-digits")
    elastic = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, images_per_step=24),
        cluster=dataclasses.replace(config.cluster, num_trainers=4, min_trainers=2),
    )
    alone = dataclasses.replace(config, training=dataclasses.replace(config.training, images_per_step=12))
    assert elastic.images_per_rank == 12
    assert _count(elastic) == _count(alone)


def test_all_pairs_of_multi_crop_forward_each_local_view_once() -> None:
    """Another global view costs the same each time; doubling the global views does not double the step."""
    config = _with(get_recipe("ibot-digits"), rule="all_pairs")
    two, three, four = (_count(_with(config, num_global_views=number)) for number in (2, 3, 4))
    assert four - three == pytest.approx(three - two, rel=0.02)
    assert four < 1.9 * two
    assert two == _count(_with(config, rule="first", num_chosen_local_views=config.selection.num_local_views))
