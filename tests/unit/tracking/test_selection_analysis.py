"""Analysis of selection logs whose choices are known: by hand, by least overlap, at random, by brightness."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvp_ray.cli.analyse import main
from hvp_ray.config import TransformConfig, ViewGroupConfig
from hvp_ray.errors import DataError
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.selection.candidates import pair_table
from hvp_ray.tracking.logged_pairs import FEATURES, MEASURES, pair_features, read_selection_log
from hvp_ray.tracking.selection_analysis import analyse_selection
from hvp_ray.tracking.selection_figures import draw_selection_figures
from hvp_ray.tracking.selection_log import PLAN_COLUMNS
from hvp_ray.tracking.selection_metrics import color_distances
from hvp_ray.views.geometry import CROP_WORDS, crop_iou, draw_crops
from hvp_ray.views.plan import draw_plan

PAIRS = pair_table(4)
STEPS_PER_EPOCH, IMAGES_PER_STEP = 30, 50
NEUTRAL: dict[str, Any] = {
    "flip": False,
    "jitter": False,
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue_turns": 0.0,
    "grayscale": False,
    "blur_sigma_px": 0.0,
    "solarize": False,
}
# Written out, as logs of earlier runs have them.
VIEW_TYPES = {
    **dict.fromkeys(("top", "left", "height", "width"), pa.int32()),
    **dict.fromkeys(("flip", "jitter", "grayscale", "solarize"), pa.bool_()),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue_turns", "blur_sigma_px"), pa.float32()),
}


def _plan(count: int, num_views: int = 4) -> ViewPlan:
    return draw_plan(
        seed=0,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(count),
        image_sizes=(np.full(count, 375, np.int32), np.full(count, 500, np.int32)),
        num_views=num_views,
        group=ViewGroupConfig(size_px=32, even=TransformConfig()),
    )


def _write(
    run_dir: Path,
    views: dict[str, list[list[Any]]],
    chosen: list[int],
    *,
    scores: list[list[float] | None] | None = None,
    steps: list[int] | None = None,
    image_px: tuple[int, int] = (375, 500),
    pairs: np.ndarray = PAIRS,
    log_format: int = 1,
) -> Path:
    count = len(chosen)
    steps = steps or [1 + row // IMAGES_PER_STEP for row in range(count)]
    columns = {
        "step": pa.array(steps, pa.int64()),
        "epoch": pa.array([(step - 1) // STEPS_PER_EPOCH for step in steps], pa.int32()),
        "sample_id": pa.array(range(count), pa.int64()),
        "image_height": pa.array([image_px[0]] * count, pa.int32()),
        "image_width": pa.array([image_px[1]] * count, pa.int32()),
        "chosen_pair": pa.array(chosen, pa.int16()),
        "scores": pa.array(scores or [None] * count, pa.list_(pa.float32())),
        **{name: pa.array(views[name], pa.list_(kind)) for name, kind in VIEW_TYPES.items()},
    }
    about = {
        "format": log_format,
        "pairs": pairs.tolist(),
        "rule": "hardest",
        "recipe": "simsiam-digits",
        "run_name": "known",
        "steps_per_epoch": STEPS_PER_EPOCH,
        "seed": 3,
    }
    path = run_dir / "log" / f"attempt-0001-step-{min(steps) - 1:08d}" / f"selection-{max(steps):08d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata({b"hvp_ray": json.dumps(about).encode()}), path)
    return path


def _write_plan(run_dir: Path, plan: ViewPlan, chosen: np.ndarray, scores: np.ndarray | None = None) -> None:
    views = {name: getattr(plan, name).T.tolist() for name in VIEW_TYPES}
    _write(run_dir, views, chosen.tolist(), scores=None if scores is None else scores.tolist())


def _ious(plan: ViewPlan) -> np.ndarray:
    return crop_iou(plan.top, plan.left, plan.height, plan.width, PAIRS)


def _two_images(run_dir: Path, **settings: Any) -> Path:
    """Write two images of 30 x 40 px with three views each; pairs (0,1), (0,2), (1,2)."""
    views = {name: [[value] * 3] * 2 for name, value in NEUTRAL.items()} | {
        "top": [[0, 0, 10], [0, 0, 0]],
        "left": [[0, 10, 0], [0, 0, 20]],
        "height": [[20, 20, 20], [30, 15, 30]],
        "width": [[20, 20, 20], [40, 40, 20]],
        "jitter": [[True, False, True], [False, False, False]],
        "brightness": [[1.3, 1.0, 1.3], [1.0, 1.0, 1.0]],
        "hue_turns": [[0.4, 0.0, 0.1], [0.0, 0.0, 0.0]],
        "grayscale": [[True, False, False], [False, False, False]],
        "blur_sigma_px": [[0.5, 0.0, 1.5], [0.0, 0.0, 0.0]],
        "flip": [[False, False, True], [True, True, True]],
    }
    return _write(
        run_dir,
        views,
        [2, 1],
        pairs=pair_table(3),
        image_px=(30, 40),
        scores=[[1.0, 2.0, 3.0], None],
        steps=[2, 2],
        **settings,
    )


def test_log_and_analysis_follow_the_fields_of_the_plan() -> None:
    """A new augmentation is a field of `ViewPlan`; log, features and measures list it without a further change."""
    assert PLAN_COLUMNS == VIEW_TYPES
    crop = {"top", "left", "height", "width", "jitter"}
    named = {"hue_turns": "hue", "blur_sigma_px": "blur_differs"}
    flags = {name: f"{name}_differs" for name, kind in VIEW_TYPES.items() if kind == pa.bool_()}
    expected = {named.get(name, flags.get(name, name)) for name in VIEW_TYPES if name not in crop}
    assert set(FEATURES) == expected | {"iou", "corner_distance", "area_ratio"}
    assert {name for name in FEATURES if name.endswith("_differs")} <= set(MEASURES)
    assert set(dataclasses.asdict(_plan(1))) == {*VIEW_TYPES, "jitter_order", "mask"}


def test_two_images_by_hand(tmp_path: Path) -> None:
    _two_images(tmp_path)
    log = read_selection_log(tmp_path)
    assert (log.num_images, log.num_views, log.num_pairs, log.seed, log.rule) == (2, 3, 3, 3, "hardest")
    np.testing.assert_array_equal(log["scores"][0], [1.0, 2.0, 3.0])
    assert np.isnan(log["scores"][1]).all()
    features = pair_features(log)
    # image 0: squares of 20 at (0,0), (0,10) and (10,0) (top, left); image 1: all, its upper half, its right half
    expected = {
        "iou": [[200 / 600, 200 / 600, 100 / 700], [0.5, 0.5, 300 / 900]],
        "corner_distance": [[10 / 50, 10 / 50, 200**0.5 / 50], [0.0, 20 / 50, 20 / 50]],
        "area_ratio": [[1.0, 1.0, 1.0], [0.5, 0.5, 1.0]],
        "smaller_area": [[1 / 3] * 3, [0.5, 0.5, 0.5]],
        "larger_area": [[1 / 3] * 3, [1.0, 1.0, 0.5]],
        "brightness": [[0.3, 0.0, 0.3], [0.0] * 3],
        "hue": [[0.4, 0.3, 0.1], [0.0] * 3],
        "color_distance": [[0.5, 0.3, 0.1**0.5], [0.0] * 3],
        "grayscale_differs": [[1.0, 1.0, 0.0], [0.0] * 3],
        "blur_differs": [[1.0, 0.0, 1.0], [0.0] * 3],
        "flip_differs": [[0.0, 1.0, 1.0], [0.0] * 3],
        "solarize_differs": [[0.0] * 3, [0.0] * 3],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(features[name], values, atol=1e-6, err_msg=name)

    analysis = analyse_selection(log)
    whole = analysis.whole_run
    assert whole.measures["iou"].chosen == pytest.approx((1 / 7 + 1 / 2) / 2)
    assert whole.measures["iou"].other == pytest.approx((1 / 3 + (1 / 2 + 1 / 3) / 2) / 2)
    difference = np.array([1 / 7 - 1 / 3, 1 / 2 - 5 / 12])
    assert whole.measures["iou"].standard_error == pytest.approx(difference.std(ddof=1) / 2**0.5, rel=1e-5)
    assert whole.measures["flip_differs"].chosen == 0.5
    assert whole.measures["flip_differs"].other == 0.25
    assert whole.min_iou_share == 0.5
    assert analysis.chance == pytest.approx(1 / 3)
    assert analysis.pair_shares == (0.0, 0.5, 0.5)
    assert whole.epochs_done == pytest.approx(2 / STEPS_PER_EPOCH)
    assert (analysis.choice_model, analysis.score_model) == (None, None)  # too few images
    assert analysis.iou_score_correlation is not None  # of image 0 alone
    # IoU (1/3, 1/3, 1/7) has ranks 1.5, 1.5, 0, scores 0, 1, 2
    assert analysis.iou_score_correlation.spearman == pytest.approx(-1.5 / (1.5 * 2) ** 0.5)
    assert json.loads(json.dumps(analysis.to_dict()))["whole_run"]["measures"]["iou"]["chosen"] == pytest.approx(9 / 28)


def test_choice_of_the_least_iou_is_recognised(tmp_path: Path) -> None:
    plan = _plan(4500)
    ious = _ious(plan)
    _write_plan(tmp_path, plan, ious.argmin(axis=1), -ious)
    analysis = analyse_selection(read_selection_log(tmp_path))
    assert analysis.whole_run.min_iou_share == 1.0
    assert analysis.whole_run.measures["iou"].chosen == pytest.approx(float(ious.min(axis=1).mean()), rel=1e-5)
    assert [period.first_epoch for period in analysis.per_epoch] == [0, 1, 2]
    assert [period.num_images for period in analysis.per_epoch] == [1500, 1500, 1500]
    assert sum(period.num_images for period in analysis.first_epoch) == 1500
    assert len(analysis.first_epoch) == 8
    choice, score, correlation = analysis.choice_model, analysis.score_model, analysis.iou_score_correlation
    assert choice is not None
    assert choice.accuracy > 0.97
    assert choice.min_iou_accuracy == 1.0
    assert choice.log_likelihood_share > 0.8
    assert min(choice.features, key=lambda name: choice.features[name].coefficient) == "iou"
    assert max(choice.features, key=lambda name: choice.features[name].accuracy_lost) == "iou"
    assert score is not None
    assert max(score.features, key=lambda name: score.features[name].main_effect) == "iou"
    assert max(score.features, key=lambda name: score.features[name].permutation) == "iou"
    assert correlation is not None
    assert correlation.pearson == pytest.approx(-1.0, abs=1e-6)
    assert correlation.spearman == pytest.approx(-1.0, abs=1e-6)
    histogram = analysis.iou_histogram
    assert sum(histogram.chosen_share) == pytest.approx(1.0)
    assert sum(histogram.other_share) == pytest.approx(1.0)
    assert sum(histogram.chosen_share[:8]) > sum(histogram.other_share[:8]) + 0.2


def test_random_choice_is_recognised_as_such(tmp_path: Path) -> None:
    plan, generator = _plan(6000), np.random.default_rng(5)
    _write_plan(tmp_path, plan, generator.integers(6, size=6000))
    analysis = analyse_selection(read_selection_log(tmp_path))
    assert analysis.whole_run.min_iou_share == pytest.approx(1 / 6, abs=0.015)
    assert analysis.pair_shares == pytest.approx([1 / 6] * 6, abs=0.015)
    for name in MEASURES:
        measure = analysis.whole_run.measures[name]
        assert measure.standard_error is not None
        assert abs(measure.chosen - measure.other) <= 4 * measure.standard_error
    assert analysis.choice_model is not None
    assert analysis.choice_model.accuracy == pytest.approx(1 / 6, abs=0.04)
    assert abs(analysis.choice_model.log_likelihood_share) < 0.01
    assert analysis.score_model is None
    assert analysis.iou_score_correlation is None


def test_score_by_brightness_is_recognised(tmp_path: Path) -> None:
    plan = _plan(4500)
    scores = -np.abs(plan.brightness[PAIRS[:, 0]] - plan.brightness[PAIRS[:, 1]]).T
    scores = scores + 0.02 * np.random.default_rng(1).normal(size=scores.shape).astype(np.float32)
    _write_plan(tmp_path, plan, scores.argmax(axis=1), scores)
    analysis = analyse_selection(read_selection_log(tmp_path))
    choice, score, correlation = analysis.choice_model, analysis.score_model, analysis.iou_score_correlation
    assert choice is not None and score is not None and correlation is not None
    assert min(choice.features, key=lambda name: choice.features[name].coefficient) == "brightness"
    ranked = sorted(FEATURES, key=lambda name: -score.features[name].main_effect)
    assert ranked[0] == "brightness"
    assert score.features["brightness"].main_effect > 10 * score.features[ranked[1]].main_effect
    assert score.features["brightness"].permutation > 0.3
    assert score.r2 > 0.4
    assert abs(correlation.spearman) < 0.05
    colors = analysis.last_third.measures["color_distance"]
    assert colors.chosen < colors.other


def test_color_distance_is_that_of_the_metrics(tmp_path: Path) -> None:
    plan = _plan(200)
    _write_plan(tmp_path, plan, np.zeros(200, np.int64))
    features = pair_features(read_selection_log(tmp_path))
    np.testing.assert_allclose(features["color_distance"], color_distances(plan, PAIRS), atol=1e-6)


def test_missing_logs_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_selection_log(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"tracking\.selection_images_per_epoch"):
        read_selection_log(tmp_path)
    (tmp_path / "log").mkdir()
    with pytest.raises(DataError, match="rule=first"):
        read_selection_log(tmp_path)


def test_damaged_and_newer_logs_are_named(tmp_path: Path) -> None:
    path = _two_images(tmp_path / "newer", log_format=2)
    with pytest.raises(DataError, match="format 2"):
        read_selection_log(tmp_path / "newer")
    path = _two_images(tmp_path / "damaged")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=path.name):
        read_selection_log(tmp_path / "damaged")


def test_other_layouts_are_left_out_and_repeated_steps_counted_once(tmp_path: Path) -> None:
    plan, other = _plan(100), _plan(20, num_views=3)
    views = {name: getattr(plan, name).T.tolist() for name in VIEW_TYPES}
    _write(tmp_path, views, [0] * 100, steps=[row // 10 + 1 for row in range(100)])  # steps 1 to 10
    _write(tmp_path, views, [1] * 100, steps=[row // 10 + 6 for row in range(100)])  # 6 to 15, of a resumed run
    few = {name: getattr(other, name).T.tolist() for name in VIEW_TYPES}
    _write(tmp_path, few, [2] * 20, steps=[20] * 20, pairs=pair_table(3))
    log = read_selection_log(tmp_path)
    assert log.num_views == 4
    assert log.num_images_left_out == 20
    assert np.bincount(log["step"]).tolist() == [0] + [10] * 15
    assert np.bincount(log["chosen_pair"]).tolist() == [100, 50]


def test_one_pair_is_no_choice(tmp_path: Path) -> None:
    plan = _plan(10, num_views=2)
    views = {name: getattr(plan, name).T.tolist() for name in VIEW_TYPES}
    _write(tmp_path, views, [0] * 10, pairs=pair_table(2))
    with pytest.raises(DataError, match=r"selection\.num_views"):
        analyse_selection(read_selection_log(tmp_path))


def test_program_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(600)
    ious = _ious(plan)
    _write_plan(tmp_path / "run", plan, ious.argmin(axis=1), -ious)
    assert main([str(tmp_path / "run"), "--json", str(tmp_path / "out" / "numbers.json")]) == 0
    text = capsys.readouterr().out
    assert "0.345-0.355" in text
    assert "chosen pair is that of least IoU" in text
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["whole_run"]["min_iou_share"] == 1.0
    names = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert names == {
        f"selection_{name}.png" for name in ("iou", "min_iou_share", "color", "iou_histogram", "importance")
    }
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "expected the folder of a run" in capsys.readouterr().err


def test_figures_of_a_tiny_log(tmp_path: Path) -> None:
    _two_images(tmp_path)
    written = draw_selection_figures(tmp_path / "figures", analyse_selection(read_selection_log(tmp_path)))
    assert "selection_importance.png" not in {path.name for path in written}
    assert all(path.stat().st_size > 1000 for path in written)


@pytest.mark.parametrize(
    ("image_px", "crop_scale", "mean", "mean_of_minimum"),
    [
        ((375, 500), (0.2, 1.0), 0.474, 0.285),
        ((224, 224), (0.2, 1.0), 0.504, 0.331),
        ((32, 32), (0.2, 1.0), 0.495, 0.319),
        ((375, 500), (0.08, 1.0), 0.381, 0.182),
        ((375, 500), (0.4, 1.0), 0.609, 0.452),
    ],
)
def test_random_pairs_overlap_as_in_the_authors_setting(
    image_px: tuple[int, int], crop_scale: tuple[float, float], mean: float, mean_of_minimum: float
) -> None:
    count = 20_000
    heights, widths = (np.full(count, side, np.int32) for side in image_px)
    uniforms = np.random.default_rng(0).random((4, count, CROP_WORDS))
    ious = crop_iou(*draw_crops(uniforms, heights, widths, TransformConfig(crop_scale=crop_scale)), PAIRS)
    assert float(ious.mean()) == pytest.approx(mean, abs=0.005)
    assert float(ious.min(axis=1).mean()) == pytest.approx(mean_of_minimum, abs=0.005)
