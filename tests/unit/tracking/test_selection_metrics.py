"""Selection metrics and the collapse watch against hand-computed cases."""

import logging

import numpy as np
import pytest
import torch

from hvp_ray.config import TransformConfig, ViewGroupConfig
from hvp_ray.randomness import Purpose
from hvp_ray.tracking.collapse import CollapseWatch, effective_rank, embedding_std
from hvp_ray.tracking.selection_metrics import color_distances, describe_selection
from hvp_ray.views.plan import draw_plan


def _plan(num_views: int = 4, count: int = 50):
    return draw_plan(
        seed=0,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(count),
        heights=np.full(count, 100, np.int32),
        widths=np.full(count, 100, np.int32),
        num_views=num_views,
        group=ViewGroupConfig(size_px=32, even=TransformConfig()),
    )


def test_color_distance_of_a_pair_is_euclidean_over_the_factors() -> None:
    plan = _plan()
    a, b = plan.view(0, 7), plan.view(2, 7)
    names = ("brightness", "contrast", "saturation", "hue_turns")
    expected = sum((a[n] - b[n]) ** 2 for n in names) ** 0.5
    assert color_distances(plan)[7, 1] == pytest.approx(expected, rel=1e-5)


def test_chosen_and_other_pairs_average_to_all_pairs() -> None:
    plan, generator = _plan(), np.random.default_rng(0)
    scores = generator.normal(size=(50, 6)).astype(np.float32)
    metrics = describe_selection(plan, scores.argmax(axis=1), scores)
    assert metrics["selection/chosen_score"] == pytest.approx(scores.max(axis=1).mean(), rel=1e-5)
    mean = (metrics["selection/chosen_score"] + 5 * metrics["selection/other_score"]) / 6
    assert mean == pytest.approx(scores.mean(), abs=1e-6)
    assert 0.0 <= metrics["selection/min_iou_share"] <= 1.0


def test_one_pair_has_no_others() -> None:
    metrics = describe_selection(_plan(num_views=2), np.zeros(50, np.int64), None)
    assert set(metrics) == {"selection/chosen_iou", "selection/chosen_color_distance"}


def test_embedding_std_is_one_for_isotropic_and_zero_for_collapsed_embeddings() -> None:
    assert float(embedding_std(torch.randn(4000, 64))) == pytest.approx(1.0, abs=0.03)
    assert float(embedding_std(torch.ones(10, 8) * torch.arange(1, 11)[:, None])) == pytest.approx(0.0, abs=1e-6)


def test_effective_rank_counts_directions() -> None:
    directions = torch.linalg.qr(torch.randn(32, 32))[0][:5]
    signs = torch.randn(2000, 5).sign()
    assert float(effective_rank(signs @ directions)) == pytest.approx(5.0, abs=0.1)


def test_collapse_is_warned_of_once_and_again_after_recovery(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch()
    with caplog.at_level(logging.WARNING):
        for step, std in enumerate((1.0, 0.05, 0.04, 0.9, 0.02)):
            watch.see(step, std)
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1", "step 4"]
