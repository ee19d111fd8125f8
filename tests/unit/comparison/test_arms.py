"""Arms change only the choice of views; the long arm changes the length instead."""

import dataclasses
from pathlib import Path

import pytest

from hvp_ray.comparison.arms import ARMS, get_arm, hard_arm_of
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.comparison.study import Study
from hvp_ray.config import config_to_dict, flatten
from hvp_ray.errors import ConfigError
from hvp_ray.recipes import RECIPES, get_recipe
from hvp_ray.selection import hard_step
from tests.helpers import resolved_of, tiny_config


@pytest.mark.parametrize("recipe", ["simsiam-digits", "dino-imagenet-vits16-100ep", "ibot-digits"])
@pytest.mark.parametrize("name", [*ARMS, "every-3", "hardest-112px"])
def test_an_arm_is_a_valid_run_that_differs_in_its_selection_only(recipe: str, name: str) -> None:
    base = get_recipe(recipe)
    if name == "hardest-112px" and base.views.global_views.size_px < 112:
        with pytest.raises(ConfigError, match="at most views.global_views.size_px"):
            get_arm(name).configure(base)
        return
    before, after = (flatten(config_to_dict(c)) for c in (base, get_arm(name).configure(base)))
    changed = {key for key in before if before[key] != after[key]}
    assert all(key.startswith("selection.") for key in changed)


def test_controls_ignore_a_recipes_limit_and_every() -> None:
    recipe = get_recipe(next(name for name in RECIPES if name.startswith("dino-digits")))
    odd = dataclasses.replace(recipe, selection=dataclasses.replace(recipe.selection, limit=3, every=2))
    assert get_arm("random").configure(odd).selection.every == 1
    assert get_arm("hardest").configure(odd).selection.every == 2
    assert get_arm("hardest").configure(odd).selection.limit == 3


def test_vanilla_renders_two_views_and_the_batch_norm_control_all() -> None:
    base = get_recipe("simsiam-digits")
    assert hard_step(get_arm("vanilla").configure(base).selection).num_views == 2
    control = get_arm("batch-norm").configure(base).selection
    assert hard_step(control).num_views == 4 and control.score_always and control.scoring_batch_norm == "faithful"


def test_plan_has_whole_seeds_first_and_only_the_long_arm_is_longer() -> None:
    base = tiny_config("unused")
    same = dict.fromkeys(("render_cpu_seconds", "views_per_image", "forwards_per_image", "memory_bytes"), 1.0)
    costs = {
        name: StepCost(step_seconds=seconds, counted_operations=1.0, **same)
        for name, seconds in (("vanilla", 1.0), ("hardest", 1.54))
    }
    runs = Study(
        name="c",
        folder=Path("unused"),
        base=base,
        resolved=resolved_of(base),
        arms=tuple(get_arm(name) for name in ("vanilla", "hardest", "vanilla-long")),
        seeds=(3, 5),
        accounting="measured",
        costs=costs,
        steps_per_epoch=10,
    ).runs()
    assert [run.config.run.name for run in runs] == [
        f"c-{arm}-s{seed}" for seed in (3, 5) for arm in ("vanilla", "hardest", "vanilla-long-31steps")
    ]
    assert [run.num_steps for run in runs[:3]] == [20, 20, 31]
    assert runs[2].config.training.num_steps == 31
    assert {run.config.run.seed for run in runs[3:]} == {5}
    assert runs[0].config.tracking.arm == "vanilla" and runs[0].config.tracking.comparison == "c"


def test_unknown_arm_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hardest'"):
        get_arm("hardst")


def test_long_arm_needs_a_hard_one() -> None:
    with pytest.raises(ConfigError, match="add hardest"):
        hard_arm_of([get_arm("vanilla"), get_arm("vanilla-long"), get_arm("random")])
    assert hard_arm_of([get_arm("vanilla"), get_arm("every-2")]).name == "every-2"
