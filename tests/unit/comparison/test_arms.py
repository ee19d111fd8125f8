"""Arms change only the choice of views; the long arm changes the length instead."""

import dataclasses

import numpy as np
import pytest

from hvp_ray.comparison.arms import ARMS, get_arm, hard_arm_of
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.comparison.study import Study
from hvp_ray.config import config_to_dict, flatten
from hvp_ray.errors import ConfigError
from hvp_ray.randomness import Purpose
from hvp_ray.recipes import RECIPES, get_recipe
from hvp_ray.records import ViewPlan
from hvp_ray.selection import hard_step
from hvp_ray.views.plan import draw_plan
from tests.helpers import resolved_of, tiny_config

_ALSO_CHANGED = {
    "all-pairs": {
        "training.images_per_step",
        "optimizer.learning_rate_per_256",
        "optimizer.warmup_epochs",
        "method.freeze_last_layer_epochs",
        "method.warmup_teacher_epochs",
        "method.warmup_patch_teacher_epochs",
    },
    "asym-aug": {"views.global_views.odd"},
}
"""Beside fields of `selection`."""


@pytest.mark.parametrize("recipe", ["simsiam-digits", "dino-imagenet-vits16-100ep", "ibot-digits"])
@pytest.mark.parametrize(
    "name", [*(name for name in ARMS if name != "fast-siam"), "hardest:every=3", "all-pairs:weighting=softmax"]
)
def test_an_arm_is_a_valid_run_that_differs_in_its_selection(recipe: str, name: str) -> None:
    base = get_recipe(recipe)
    before, after = (flatten(config_to_dict(c)) for c in (base, get_arm(name).configure(base)))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    also = _ALSO_CHANGED.get(name.partition(":")[0], set())
    assert all(key.startswith(("selection.", *also)) for key in changed)


def test_arms_reset_what_a_recipe_sets_for_its_own_rule() -> None:
    base = get_recipe("simclr-digits")
    late = base.selection.with_rule("hardest", start_fraction=0.5, ramp_fraction=0.2, ramp_from=0.3)
    weighted = base.selection.with_rule("all_pairs", weighting="softmax", weight_temperature=0.5)
    for selection in (late, weighted, base.selection.with_rule("first", score_always=True, num_views=2)):
        config = dataclasses.replace(base, selection=selection)
        for name in ("vanilla", "random", "predicted:num_views=4", "all-pairs"):
            assert get_arm(name).configure(config).selection.rule == get_arm(name).selection["rule"]
        assert get_arm("all-pairs").configure(config).selection.weighting == "mean"


def test_all_pairs_with_local_views_trains_on_as_many_views_per_step() -> None:
    """4 + 4 views of half the images: 16 global and 16 local views of 4 images; vanilla has 2 + 2 of 8."""
    base = get_recipe("dino-digits")
    config = get_arm("all-pairs").configure(base)
    views = config.selection.num_candidate_views + (config.selection.num_local_views or 0)
    chosen = 2 + (base.selection.num_chosen_local_views or 0)
    assert config.training.images_per_step * views == base.training.images_per_step * chosen
    longer = dataclasses.replace(base, method=dataclasses.replace(base.method, warmup_teacher_epochs=30))
    assert get_arm("all-pairs").configure(longer).method.warmup_teacher_epochs == 15


def test_vanilla_long_takes_no_settings() -> None:
    with pytest.raises(ConfigError, match="vanilla-long takes no settings"):
        get_arm("vanilla-long:every=1")


def test_fast_siam_is_an_arm_of_simsiam_only() -> None:
    assert get_arm("fast-siam").configure(get_recipe("simsiam-digits")).method.averaged_target
    with pytest.raises(ConfigError, match="arm fast-siam: .* the recipe's method is dino"):
        get_arm("fast-siam").configure(get_recipe("dino-digits"))


@pytest.mark.parametrize("recipe", ["simclr-cifar10-small", "simclr-imagenet-r50-100ep", "dino-imagenet-vits16-100ep"])
def test_second_view_of_asym_aug_is_the_random_arms_crop_and_flip_and_nothing_else(recipe: str) -> None:
    def plan_of(arm: str) -> ViewPlan:
        config = get_arm(arm).configure(get_recipe(recipe))
        return draw_plan(
            seed=3,
            purpose=Purpose.GLOBAL_VIEWS,
            epoch=1,
            sample_ids=np.arange(200),
            image_sizes=(np.full(200, 300, dtype=np.int32), np.full(200, 400, dtype=np.int32)),
            num_views=2,
            group=config.views.global_views,
        )

    asym, random = plan_of("asym-aug"), plan_of("vanilla")
    geometry = ("top", "left", "height", "width", "flip")
    for field in dataclasses.fields(ViewPlan):
        mine, theirs = getattr(asym, field.name), getattr(random, field.name)
        if mine is None and theirs is None:
            continue
        np.testing.assert_array_equal(mine[0], theirs[0], err_msg=field.name)
        if field.name in geometry:
            np.testing.assert_array_equal(mine[1], theirs[1], err_msg=field.name)
    assert random.jitter[1].any() and random.grayscale[1].any()
    for name in ("jitter", "grayscale", "blur_sigma_px", "solarize"):
        assert not getattr(asym, name)[1].any(), name


def test_an_arm_sets_fields_of_selection_after_a_colon() -> None:
    arm = get_arm("hardest:every=3,quantile=0.8")
    selection = arm.configure(get_recipe("simsiam-digits")).selection
    assert (selection.rule, selection.every, selection.quantile) == ("hardest", 3, 0.8)
    assert arm.label == "hardest-every-3-quantile-0.8"
    with pytest.raises(ConfigError, match="'everyth' is no setting of an arm; did you mean 'every'"):
        get_arm("hardest:everyth=3")
    with pytest.raises(
        ConfigError, match="arm hardest:scoring_resolution_px=112: .* at most views.global_views.size_px"
    ):
        get_arm("hardest:scoring_resolution_px=112").configure(get_recipe("simsiam-digits"))


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
        location="unused",
        base=base,
        resolved=resolved_of(base),
        arms=tuple(get_arm(name) for name in ("vanilla", "hardest", "vanilla-long")),
        seeds=(3, 5),
        budget="steps",
        accounting="measured",
        costs=costs,
        num_images=10 * base.training.images_per_step,
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
    assert hard_arm_of([get_arm("vanilla"), get_arm("hardest:every=2")]).name == "hardest:every=2"
