"""Selection metrics and the collapse watch against hand-computed cases."""

import logging

import numpy as np
import pytest
import torch

from hvp_ray.config import TransformConfig, ViewGroupConfig
from hvp_ray.errors import TrainingError
from hvp_ray.methods.self_distillation import teacher_measurements
from hvp_ray.randomness import Purpose
from hvp_ray.selection import Candidates, CandidateScores, choose_views, pair_table
from hvp_ray.tracking.collapse import CollapseWatch, effective_rank, embedding_std
from hvp_ray.tracking.selection_metrics import color_distances, describe_masks, describe_pairs, describe_scores
from hvp_ray.views.plan import draw_plan


def _plan(num_views: int = 4, count: int = 50):
    return draw_plan(
        seed=0,
        purpose=Purpose.GLOBAL_VIEWS,
        epoch=0,
        sample_ids=np.arange(count),
        image_sizes=(np.full(count, 100, np.int32), np.full(count, 100, np.int32)),
        num_views=num_views,
        group=ViewGroupConfig(size_px=32, even=TransformConfig()),
    )


def test_color_distance_of_a_pair_is_euclidean_over_the_factors() -> None:
    plan = _plan()
    a, b = plan.view(0, 7), plan.view(2, 7)
    names = ("brightness", "contrast", "saturation", "hue_turns")
    expected = sum((a[n] - b[n]) ** 2 for n in names) ** 0.5
    assert color_distances(plan, pair_table(4))[7, 1] == pytest.approx(expected, rel=1e-5)


def test_chosen_and_other_pairs_average_to_all_pairs() -> None:
    plan, generator = _plan(), np.random.default_rng(0)
    candidates = Candidates(num_views=4)
    scores = CandidateScores(pairs_BP=torch.from_numpy(generator.normal(size=(50, 6)).astype(np.float32)))
    selection = choose_views("hardest", candidates, num_images=50, device=torch.device("cpu"), scores=scores)
    assert selection.pair_indices is not None
    metrics = describe_scores(scores, selection, candidates)
    assert metrics["selection/chosen_score"] == pytest.approx(float(scores.pairs_BP.max(dim=1).values.mean()), rel=1e-5)
    mean = (metrics["selection/chosen_score"] + 5 * metrics["selection/other_score"]) / 6
    assert mean == pytest.approx(float(scores.pairs_BP.mean()), abs=1e-6)
    of_pairs = describe_pairs(plan, candidates, selection.pair_indices.numpy())
    assert 0.0 <= of_pairs["selection/min_iou_share"] <= 1.0


def test_one_pair_has_no_others() -> None:
    candidates = Candidates(num_views=2)
    metrics = describe_pairs(_plan(num_views=2), candidates, np.zeros(50, np.int64))
    assert set(metrics) == {"selection/chosen_iou", "selection/chosen_color_distance"}
    scores = CandidateScores(pairs_BP=torch.zeros(50, 1))
    selection = choose_views("hardest", candidates, num_images=50, device=torch.device("cpu"), scores=scores)
    assert set(describe_scores(scores, selection, candidates)) == {"selection/chosen_score"}


def test_numbers_of_candidates_beyond_64_bits_are_no_obstacle() -> None:
    candidates = Candidates(num_views=4, num_local_views=96, num_chosen_local_views=48, alternating=True)
    scores = CandidateScores(pairs_BP=torch.randn(3, 4), locals_BPL=torch.randn(3, 4, 96))
    selection = choose_views("hardest", candidates, num_images=3, device=torch.device("cpu"), scores=scores)
    metrics = describe_scores(scores, selection, candidates)
    assert metrics["selection/other_score"] == pytest.approx(float(scores.mean(48).mean()), rel=1e-6)


def test_share_of_unmasked_views_is_that_of_the_chosen_ones() -> None:
    mask = np.zeros((3, 2, 2, 2), np.bool_)
    mask[0, 0, 0, 1] = mask[2, 1, 1, 1] = True
    metrics = describe_masks(mask, np.array([[0, 0], [1, 2]]))
    # image 0: view 0 masked, view 1 not; image 1: view 0 not, view 2 masked; 4 of all 6 are unmasked
    assert metrics == {"selection/unmasked_share": 0.5, "selection/unmasked_share_offered": pytest.approx(4 / 6)}


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
            watch.see(step, {"collapse/embedding_std": std})
    assert watch.num_warnings == 2
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 1", "step 4"]


def test_lasting_collapse_ends_the_run_if_asked() -> None:
    watch = CollapseWatch(max_steps=20)
    for step, std in ((1, 0.05), (110, 0.05), (120, 0.05), (135, 0.15), (140, 0.05), (159, 0.05)):
        watch.see(step, {"collapse/embedding_std": std})
    with pytest.raises(TrainingError, match=r"step 160: .* for 20 steps now; training.max_collapsed_steps=20 ends"):
        watch.see(160, {"collapse/embedding_std": 0.05})
    patient = CollapseWatch()
    for step in range(1000):
        patient.see(step, {"collapse/embedding_std": 0.0})


def test_teacher_collapse_is_warned_of_after_its_first_steps(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch()
    with caplog.at_level(logging.WARNING):
        for step, information in ((1, 0.0), (99, 0.001), (150, 0.5), (160, 0.001), (170, 0.001)):
            watch.see(step, {"collapse/embedding_std": 1.0, "collapse/teacher_information": information})
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 160"]


def test_teacher_information_is_zero_for_both_kinds_of_collapse() -> None:
    uniform = torch.full((2, 6, 4), 0.25)
    one_prototype = torch.eye(4)[0].expand(2, 6, 4)
    by_image = torch.eye(4)[torch.arange(12) % 4].reshape(2, 6, 4)
    measured = [teacher_measurements(q) for q in (uniform, one_prototype, by_image)]
    entropies = [float(m["collapse/teacher_entropy"]) for m in measured]
    information = [float(m["collapse/teacher_information"]) for m in measured]
    assert entropies == pytest.approx([np.log(4), 0.0, 0.0], abs=1e-6)
    assert information == pytest.approx([0.0, 0.0, np.log(4)], abs=1e-6)
