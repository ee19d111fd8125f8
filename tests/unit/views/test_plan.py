"""Plans: a function of the address alone, and of nothing else."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.config import TransformConfig, ViewGroupConfig
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.views.plan import draw_plan

GOLDEN = Path(__file__).with_name("golden_plan_seed0.json")


def _plan(
    ids: list[int], *, num_views: int = 4, transform: TransformConfig | None = None, odd: TransformConfig | None = None,
    seed: int = 0, epoch: int = 0,
) -> ViewPlan:  # fmt: skip
    return draw_plan(
        seed=seed,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=epoch,
        sample_ids=np.array(ids, np.int64),
        image_sizes=(np.array([100 + i for i in ids], np.int32), np.array([150 + 2 * i for i in ids], np.int32)),
        num_views=num_views,
        group=ViewGroupConfig(size_px=32, even=transform or TransformConfig(), odd=odd),
    )


def _fields(plan: ViewPlan) -> dict[str, np.ndarray]:
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "mask"}


def _golden_with_new_fields() -> list[list[dict[str, object]]]:
    """Return the golden plan of views and images, with the fields that it lacks; recorded values stay."""
    plan, golden = _plan([0, 1, 2]), json.loads(GOLDEN.read_text())
    return [[plan.view(v, b) | view for b, view in enumerate(views)] for v, views in enumerate(golden)]


def test_golden_plan_of_seed_0_has_not_changed() -> None:
    plan, golden = _plan([0, 1, 2]), _golden_with_new_fields()
    values = [[plan.view(v, b) for b in range(3)] for v in range(4)]
    assert values == golden, "a changed plan changes every run: it needs a new major version"
    recorded = json.loads(GOLDEN.read_text())
    assert values == recorded, "a field is not recorded; run `python -m tests.unit.views.test_plan` to add it"


def test_plan_is_independent_of_batch_composition_and_order() -> None:
    together, alone = _plan([7, 3, 11]), _plan([3])
    for name, values in _fields(together).items():
        assert np.array_equal(values[:, 1:2], getattr(alone, name)), name


def test_view_is_the_same_whatever_the_number_of_views() -> None:
    four, two = _plan([1, 2, 3], num_views=4), _plan([1, 2, 3], num_views=2)
    for name, values in _fields(four).items():
        assert np.array_equal(values[:2], getattr(two, name)), name


def test_views_seeds_epochs_and_images_differ() -> None:
    plan = _plan([1, 2])
    others = [_plan([1, 2], seed=1), _plan([1, 2], epoch=1)]
    assert not np.array_equal(plan.brightness[0], plan.brightness[1])
    assert not np.array_equal(plan.brightness[:, 0], plan.brightness[:, 1])
    for other in others:
        assert not np.array_equal(plan.brightness, other.brightness)


def test_switching_one_operation_off_changes_no_other_decision() -> None:
    base = _fields(_plan(list(range(50))))
    without = _fields(_plan(list(range(50)), transform=TransformConfig(blur_probability=0.0, flip_probability=0.0)))
    for name in base.keys() - {"blur_sigma_px", "flip"}:
        assert np.array_equal(base[name], without[name]), name


@pytest.mark.parametrize(
    ("setting", "field", "neutral"),
    [
        ("flip_probability", "flip", False),
        ("grayscale_probability", "grayscale", False),
        ("blur_probability", "blur_sigma_px", 0.0),
        ("solarize_probability", "solarize", False),
        ("jitter_probability", "jitter", False),
        ("jitter_probability", "brightness", 1.0),
        ("jitter_probability", "hue_turns", 0.0),
    ],
)
def test_probability_zero_means_never_and_one_means_always(setting: str, field: str, neutral: float) -> None:
    ids = list(range(300))
    never = getattr(_plan(ids, transform=TransformConfig(**{setting: 0.0})), field)
    always = getattr(_plan(ids, transform=TransformConfig(**{setting: 1.0})), field)
    assert np.all(never == neutral)
    assert np.all(always != neutral)


def test_probabilities_and_ranges_are_those_of_the_config() -> None:
    plan = _plan(list(range(3000)))
    assert plan.jitter.mean() == pytest.approx(0.8, abs=0.015)
    assert plan.grayscale.mean() == pytest.approx(0.2, abs=0.015)
    assert (plan.blur_sigma_px > 0).mean() == pytest.approx(0.5, abs=0.02)
    jittered = plan.brightness[plan.jitter]
    assert jittered.min() >= 0.6
    assert jittered.max() <= 1.4
    assert jittered.mean() == pytest.approx(1.0, abs=0.01)
    assert np.abs(plan.hue_turns).max() <= 0.1
    sigmas = plan.blur_sigma_px[plan.blur_sigma_px > 0]
    assert sigmas.min() >= 0.1
    assert sigmas.max() <= 2.0
    orders = plan.jitter_order.reshape(-1, 4)
    assert np.all(np.sort(orders, axis=1) == [0, 1, 2, 3])
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(counts - 500).max() < 120


def test_odd_views_follow_the_odd_transform_and_even_views_do_not_notice() -> None:
    odd = TransformConfig(solarize_probability=1.0, blur_probability=0.0)
    plan, plain = _plan([1, 2], odd=odd), _plan([1, 2])
    assert plan.solarize.tolist() == [[False, False], [True, True], [False, False], [True, True]]
    assert np.array_equal(plan.top[0::2], plain.top[0::2])
    assert np.array_equal(plan.blur_sigma_px[0::2], plain.blur_sigma_px[0::2])


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(_golden_with_new_fields(), indent=1) + "\n")
