"""Which steps a run records, and that every kind of step is among them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvp_ray.launch.local import pretrain_in_process
from hvp_ray.tracking.run_log import METRICS, read_records
from tests.helpers import tiny_config

NUM_STEPS = 24


def _train(
    output: Path, log_every_steps: int, recipe: str = "simsiam-digits", **selection: Any
) -> tuple[dict[str, Any], dict[int, dict[str, float]]]:
    """Return the summary, and the metrics of each recorded step."""
    config = tiny_config(
        str(output),
        recipe,
        run={"name": "run"},
        training={"num_steps": NUM_STEPS},
        selection=selection,
        tracking={"log_every_steps": log_every_steps, "knn_images": 0},
    )
    summary = pretrain_in_process(config)
    assert summary is not None
    return summary, {record["step"]: record["metrics"] for record in read_records(output / "run", METRICS)}


@pytest.mark.parametrize(
    ("log_every_steps", "selection", "steps", "hard"),
    [
        (10, {"every": 2}, [1, 10, 11, 20, 21, 24], [1, 11, 21]),
        (4, {"every": 3}, [1, 4, 8, 10, 12, 13, 16, 20, 22, 24], [1, 4, 10, 13, 16, 22]),
        (10, {"start_fraction": 0.5}, [1, 10, 13, 20, 24], [13, 20, 24]),
        (10, {}, [1, 10, 20, 24], [1, 10, 20, 24]),
    ],
    ids=["every-2", "every-3", "late", "always"],
)
def test_hard_steps_are_recorded_and_only_they_tell_of_chosen_pairs(
    tmp_path: Path, log_every_steps: int, selection: dict[str, Any], steps: list[int], hard: list[int]
) -> None:
    """By hand: every n-th step, the first, the last, and the first hard one since the last of these."""
    summary, recorded = _train(tmp_path / "some", log_every_steps, **selection)
    assert list(recorded) == steps
    of_pairs = ("selection/chosen_iou", "selection/other_iou", "selection/chosen_score", "selection/other_score")
    for name in of_pairs:
        assert [step for step, values in recorded.items() if name in values] == hard, name
    regular = [step for step in steps if step % log_every_steps == 0 or step in (1, NUM_STEPS)]
    assert [step for step, values in recorded.items() if "perf/images_per_second" in values] == regular
    for name in ("chosen_iou", "other_iou"):
        expected = np.mean([recorded[step][f"selection/{name}"] for step in hard])
        assert summary[f"{name}_mean"] == pytest.approx(expected)
    _, everything = _train(tmp_path / "all", 1, **selection)
    assert list(everything) == [*range(1, NUM_STEPS + 1)]
    for step, values in recorded.items():
        for name in ("train/loss", *of_pairs):
            assert values.get(name) == everything[step].get(name), (step, name)


def test_masks_and_scores_of_random_steps_are_recorded_too(tmp_path: Path) -> None:
    _, recorded = _train(tmp_path, 10, "ibot-digits", every=2, score_always=True)
    assert list(recorded) == [1, 10, 11, 20, 21, 24]
    for step, values in recorded.items():
        assert "selection/unmasked_share" in values
        assert ("selection/chosen_iou" in values) == (step % 2 == 1)
        assert ("selection/chosen_score" in values) == (step % 2 == 1)
        assert ("selection/mean_score" in values) == (step % 2 == 0)


def test_random_views_tell_of_their_only_pair(tmp_path: Path) -> None:
    summary, recorded = _train(tmp_path, 10, rule="first")
    assert [step for step, values in recorded.items() if "selection/chosen_iou" in values] == [1, 10, 20, 24]
    assert summary["chosen_iou_mean"] is not None and summary["other_iou_mean"] is None
