"""Metrics of a step's selection: loss, overlap, colour distance and masks of the chosen views and of all others.

Source: analysis of the HVP authors: overlap in px of the original image; colour distance Euclidean over the four factors.
Differs: without jitter the factors are neutral, not zero.
"""

import numpy as np
from numpy.typing import NDArray

from hvp_ray.records import ViewPlan
from hvp_ray.selection import Candidates, CandidateScores, Selection
from hvp_ray.views.geometry import crop_iou


def color_distances(plan: ViewPlan, pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the distance between the colour factors of the two views of every pair, [B, P]."""
    factors = np.stack([plan.brightness - 1, plan.contrast - 1, plan.saturation - 1, plan.hue_turns], axis=-1)
    difference = factors[pairs[:, 0]] - factors[pairs[:, 1]]
    distances: NDArray[np.float32] = np.sqrt((difference**2).sum(axis=-1)).T
    return distances


def describe_pairs(plan: ViewPlan, candidates: Candidates, chosen: NDArray[np.int64]) -> dict[str, float]:
    """Return overlap and colour distance of chosen and other pairs of one batch.

    Args:
        plan: plan of the V global views.
        candidates: candidates of this step.
        chosen: [B], row of `candidates.pairs` of each image.
    """
    pairs = candidates.pairs
    ious = crop_iou(plan.top, plan.left, plan.height, plan.width, pairs)
    metrics = {}
    for name, values in (("iou", ious), ("color_distance", color_distances(plan, pairs))):
        chosen_values = np.take_along_axis(values, chosen[:, None], axis=1)[:, 0].astype(np.float64)
        metrics[f"selection/chosen_{name}"] = float(chosen_values.mean())
        if values.shape[1] > 1:
            others = (values.sum(axis=1, dtype=np.float64) - chosen_values) / (values.shape[1] - 1)
            metrics[f"selection/other_{name}"] = float(others.mean())
    if ious.shape[1] > 1:
        metrics["selection/min_iou_share"] = float((ious.argmin(axis=1) == chosen).mean())
    return metrics


def describe_scores(scores: CandidateScores, selection: Selection, candidates: Candidates) -> dict[str, float]:
    """Return the scoring pass's mean loss of the chosen candidates and of all others that were scored."""
    mean = scores.mean(candidates.num_chosen_local_views).double()
    if selection.scores is None:
        return {"selection/mean_score": float(mean.mean())}
    chosen = selection.scores.double()
    metrics = {"selection/chosen_score": float(chosen.mean())}
    counts = scores.is_scored_BP.sum(dim=1).double() * float(candidates.count // len(candidates.pairs))
    others = ((mean * counts - chosen) / (counts - 1.0))[counts > 1.0]
    if len(others):
        metrics["selection/other_score"] = float(others.mean())
    return metrics


def describe_masks(mask: NDArray[np.bool_], view_indices: NDArray[np.int64]) -> dict[str, float]:
    """Return the fraction of the chosen views, and of all candidates, without a mask.

    Args:
        mask: [V, B, rows, columns].
        view_indices: [S, B], the chosen views.
    """
    unmasked = ~mask.any(axis=(2, 3))
    chosen = np.take_along_axis(unmasked, view_indices, axis=0)
    return {
        "selection/unmasked_share": float(chosen.mean()),
        "selection/unmasked_share_offered": float(unmasked.mean()),
    }
