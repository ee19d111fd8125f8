"""Proposals: features by hand, the regression against least squares, hardness kept, and coefficients that never come late."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvp_ray.config import SelectionConfig, TransformConfig, ViewGroupConfig
from hvp_ray.errors import ConfigError
from hvp_ray.randomness import Purpose
from hvp_ray.records import Proposal, ViewPlan
from hvp_ray.selection import pair_table, selection_at
from hvp_ray.selection.proposals import (
    _FORGETTING,
    _RIDGE,
    FEATURES,
    HardnessPredictor,
    choose_plans,
    pair_features,
    probe_statistics,
    proposal_for,
)
from hvp_ray.views.plan import draw_plan

EVERYTHING = ViewGroupConfig(size_px=16, even=TransformConfig(solarize_probability=0.3))
SIZES = (np.full(16, 60, np.int32), np.full(16, 80, np.int32))


def _plan(first_id: int, *, num_images: int = 16, num_views: int = 4) -> ViewPlan:
    return draw_plan(
        seed=1,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=first_id + np.arange(num_images),
        image_sizes=(SIZES[0][:num_images], SIZES[1][:num_images]),
        num_views=num_views,
        group=EVERYTHING,
    )


def _statistics(features: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return probe_statistics(torch.from_numpy(features), torch.from_numpy(scores)).numpy()


def _features(plan: ViewPlan) -> NDArray[np.float64]:
    return pair_features(plan, *SIZES, pair_table(plan.num_views))


def test_features_of_two_plans_by_hand() -> None:
    """An image of 60 x 80 px: crops of 30 x 40 at (0, 0) and of 20 x 20 at (20, 30); they share 10 x 10."""

    def column(*values: float, dtype: type = np.int32) -> NDArray[np.generic]:
        return np.array(values, dtype)[:, None]

    plan = ViewPlan(
        top=column(0, 20),
        left=column(0, 30),
        height=column(30, 20),
        width=column(40, 20),
        flip=column(0, 1, dtype=np.bool_),
        jitter=column(1, 0, dtype=np.bool_),
        brightness=column(1.5, 1, dtype=np.float32),
        contrast=column(0.5, 0.75, dtype=np.float32),
        saturation=column(1.25, 2, dtype=np.float32),
        hue_turns=column(-0.0625, 0.0625, dtype=np.float32),
        jitter_order=np.zeros((2, 1, 4), np.uint8),
        grayscale=column(0, 1, dtype=np.bool_),
        blur_sigma_px=column(0, 1, dtype=np.float32),
        solarize=column(1, 1, dtype=np.bool_),
    )
    image = (np.array([60], np.int32), np.array([80], np.int32))
    found = dict(zip(FEATURES, pair_features(plan, *image, pair_table(2))[:, 0, 0].tolist(), strict=True))
    iou, distance = 100 / 1500, math.hypot(30 - 15, 40 - 20) / 100
    first_side, second_side = math.sqrt(1200 / 4800), math.sqrt(400 / 4800)
    expected = {
        "iou": iou,
        "iou_squared": iou**2,
        "contained": 100 / 400,
        "distance": distance,
        "distance_squared": distance**2,
        "side_sum": first_side + second_side,
        "side_difference": first_side - second_side,
        "side_ratio": second_side / first_side,
        "aspect_difference": 10 / 70,
        "aspect_sum": 10 / 70,
        "brightness_difference": 0.5,
        "brightness_sum": 0.5,
        "brightness_product": 0.0,
        "contrast_difference": 0.25,
        "contrast_sum": -0.75,
        "contrast_product": 0.125,
        "saturation_difference": 0.25,  # the grey view has none
        "saturation_sum": 0.25,
        "saturation_product": 0.0,
        "hue_difference": 0.625,
        "hue_sum": -0.625,
        "hue_product": 0.0,
        "gray_differs": 1.0,
        "gray_both": 0.0,
        "jitter_differs": 1.0,
        "blur_difference": 0.5,
        "blur_sum": 0.5,
        "solarize_differs": 0.0,
        "solarize_both": 1.0,
        "flip_differs": 1.0,
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_features_do_not_depend_on_the_order_of_the_views() -> None:
    plan, pairs = _plan(0), pair_table(4)
    swapped = pair_features(plan, *SIZES, pairs[:, ::-1].copy())
    assert np.array_equal(swapped, _features(plan))


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("quantile", [1.0, 0.5, 0.0])
def test_chosen_plans_have_the_place_among_all_pairs_that_the_quantile_says(
    generator: np.random.Generator, *, alternating: bool, quantile: float
) -> None:
    plan = _plan(0, num_views=6)
    pairs = pair_table(6, alternating=alternating)
    proposal = Proposal(num_plans=6, coefficients=generator.normal(size=len(FEATURES)), quantile=quantile)
    chosen = choose_plans(plan, *SIZES, proposal, alternating=alternating)
    predicted = np.einsum("f,fpb->bp", proposal.coefficients, pair_features(plan, *SIZES, pairs))
    for image in range(16):
        ordered = pairs[np.argsort(predicted[image])]
        assert chosen[:, image].tolist() == ordered[round(quantile * (len(pairs) - 1))].tolist()


def test_pairs_that_are_predicted_equal_go_to_the_lowest() -> None:
    flat = Proposal(num_plans=4, coefficients=np.zeros(len(FEATURES)), quantile=1.0)
    assert choose_plans(_plan(0), *SIZES, flat, alternating=False).tolist() == [[0] * 16, [1] * 16]


def test_coefficients_are_the_least_squares_of_all_probes_with_forgetting(generator: np.random.Generator) -> None:
    """Against numpy's lstsq on the rows themselves: centred in each image, standardised in each probe, and weighted."""
    predictor = HardnessPredictor(delay=2)
    rows, targets = [], []
    for probe in range(5):
        features, scores = _features(_plan(100 * probe)), generator.normal(size=(16, 6)) * 10.0**probe
        predictor.end_step(_statistics(features, scores))
        centred = scores - scores.mean(axis=1, keepdims=True)
        rows.append(np.concatenate([features[:, :, b].T - features[:, :, b].mean(axis=1) for b in range(16)]))
        targets.append(centred.ravel() / centred.std())
    weights = [math.sqrt(_FORGETTING ** (4 - probe)) for probe in range(5)]
    penalty = math.sqrt(_RIDGE) * np.eye(len(FEATURES))
    expected = np.linalg.lstsq(
        np.concatenate([w * x for w, x in zip(weights, rows, strict=True)] + [penalty]),
        np.concatenate([w * y for w, y in zip(weights, targets, strict=True)] + [np.zeros(len(FEATURES))]),
    )[0]
    found = predictor.coefficients_of(6)
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_difficulty_of_the_images_and_scale_of_the_loss_teach_nothing(generator: np.random.Generator) -> None:
    features, scores = _features(_plan(0)), generator.normal(size=(16, 6))
    predictors = [HardnessPredictor(delay=2) for _ in range(2)]
    predictors[0].end_step(_statistics(features, scores))
    predictors[1].end_step(_statistics(features, 7.0 * scores + generator.normal(size=(16, 1))))
    first, second = (predictor.coefficients_of(2) for predictor in predictors)
    assert first is not None and second is not None
    np.testing.assert_allclose(first, second, rtol=1e-9)


def test_true_scores_keep_most_of_the_hardness_and_shuffled_ones_nothing(generator: np.random.Generator) -> None:
    """Means over 30 made-up kinds of hardness: R2, and the hardness that the predicted of 6 pairs keeps on fresh images."""
    probes = [_features(_plan(100 * probe)) for probe in range(40)]
    fresh = _plan(100_000)
    views = {tuple(pair): index for index, pair in enumerate(pair_table(4).tolist())}
    results: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(30):
        truth = generator.normal(size=len(FEATURES))

        def hardness(features: NDArray[np.float64], truth: NDArray[np.float64] = truth) -> NDArray[np.float64]:
            signal = np.einsum("f,fpb->bp", truth, features)
            return signal + 0.5 * signal.std() * generator.normal(size=signal.shape)

        of_fresh = hardness(_features(fresh))
        most = (of_fresh.max(axis=1) - of_fresh.mean(axis=1)).mean()
        for shuffled in (False, True):
            predictor = HardnessPredictor(delay=2)
            for features in probes:
                scores = hardness(features)
                predictor.end_step(_statistics(features, generator.permuted(scores, axis=1) if shuffled else scores))
            coefficients = predictor.coefficients_of(41)
            assert coefficients is not None
            proposal = Proposal(num_plans=4, coefficients=coefficients, quantile=1.0)
            chosen = choose_plans(fresh, *SIZES, proposal, alternating=False).T
            scored = [of_fresh[image, views[tuple(pair)]] for image, pair in enumerate(chosen.tolist())]
            results[shuffled].append((predictor.r2, float((np.mean(scored) - of_fresh.mean()) / most)))
    (r2, kept), (r2_shuffled, kept_shuffled) = (np.mean(results[shuffled], axis=0) for shuffled in (False, True))
    assert r2 > 0.4
    assert kept > 0.7
    assert abs(r2_shuffled) < 0.1
    assert abs(kept_shuffled) < 0.15


def _learned(predictor: HardnessPredictor, steps: range) -> list[NDArray[np.float64]]:
    """Learn from a probe in every third step; return the coefficients after each step."""
    after = []
    for step in steps:
        scores = np.random.default_rng(step).normal(size=(16, 6))
        predictor.end_step(_statistics(_features(_plan(step)), scores) if step % 3 == 0 else None)
        after.append(predictor.state()["history"][-1].numpy())
    return after


@pytest.mark.parametrize("ahead", [0, 3, 4])
def test_step_is_requested_with_what_was_learned_a_delay_before_it_however_early(ahead: int) -> None:
    """The delay is 5. After 7 steps the predictor is restored from its state."""
    after = _learned(HardnessPredictor(delay=5), range(20))
    predictor = HardnessPredictor(delay=5)
    for step in range(20):
        if step == 7:
            predictor = HardnessPredictor(delay=5, steps_done=7, state=predictor.state())
        for requested in range(step, step + ahead + 1):
            found = predictor.coefficients_of(requested)
            if requested < 5:
                assert found is None
            else:
                assert np.array_equal(found, after[requested - 5])
        _learned(predictor, range(step, step + 1))


def test_request_before_its_coefficients_exist_is_never_answered() -> None:
    with pytest.raises(AssertionError, match="fewer than the delay"):
        HardnessPredictor(delay=5).coefficients_of(5)


def test_scores_that_are_not_finite_or_all_equal_teach_nothing() -> None:
    features = _features(_plan(0))
    for scores in (np.full((16, 6), np.nan), np.ones((16, 6))):
        predictor = HardnessPredictor(delay=2)
        predictor.end_step(_statistics(features, scores))
        assert predictor.coefficients_of(2) is None
        assert predictor.r2 == 0.0


def test_vanilla_steps_and_steps_before_the_first_lesson_have_no_proposal() -> None:
    """Of ten steps, the odd ones and the first five are vanilla; then the quantile rises to the full setting."""
    selection = SelectionConfig(
        rule="predicted", every=2, start_fraction=0.5, ramp_fraction=0.4, ramp_from=0.25, quantile=0.75, num_plans=8
    )
    of_steps = [selection_at(selection, step, num_steps=10) for step in range(10)]
    assert {(of_step.num_views, of_step.num_local_views, of_step.needs_scores) for of_step in of_steps} == {
        (2, 0, False)
    }
    learned = np.ones(len(FEATURES))
    proposals = [proposal_for(selection, of_step, learned) for of_step in of_steps]
    assert [proposal and (proposal.num_plans, proposal.quantile) for proposal in proposals] == [
        *[None] * 6,
        (8, pytest.approx(0.375)),
        None,
        (8, pytest.approx(0.625)),
        None,
    ]
    assert proposal_for(selection, of_steps[6], None) is None


def test_settings_that_predicted_cannot_use_are_refused() -> None:
    for changes, message in (
        ({"num_views": 2}, "selection.num_views=2.*3 or more with rule predicted"),
        ({"score_always": True}, "selection.score_always=True.*False with rule predicted"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(SelectionConfig(rule="predicted"), **changes)


def test_other_rules_do_not_read_the_settings_of_proposals() -> None:
    predicted = SelectionConfig(rule="predicted", num_plans=8, probe_every=2, quantile=0.5)
    assert predicted.with_rule("hardest") == SelectionConfig(quantile=0.5)
    assert predicted.with_rule("random") == SelectionConfig(rule="random")
    with pytest.raises(ConfigError, match="selection.num_plans=8.*16 with selection.rule=hardest"):
        dataclasses.replace(predicted, rule="hardest")
