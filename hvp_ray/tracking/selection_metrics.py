"""What was chosen: loss, overlap and colour distance of the chosen pairs against all others.

Source: analysis of the HVP authors (overlap in px of the original image; colour distance Euclidean over the four
factors, zeros without jitter).
"""

import numpy as np
from numpy.typing import NDArray

from hvp_ray.records import ViewPlan
from hvp_ray.selection.candidates import pair_table
from hvp_ray.views.geometry import crop_iou


def color_distances(plan: ViewPlan) -> NDArray[np.float32]:
    """Return the distance of the colour factors of every pair, [B, P]."""
    pairs = pair_table(plan.num_views)
    factors = np.stack([plan.brightness - 1, plan.contrast - 1, plan.saturation - 1, plan.hue_turns], axis=-1)
    difference = factors[pairs[:, 0]] - factors[pairs[:, 1]]
    distances: NDArray[np.float32] = np.sqrt((difference**2).sum(axis=-1)).T
    return distances


def describe_selection(
    plan: ViewPlan, chosen: NDArray[np.int64], scores_BP: NDArray[np.float32] | None
) -> dict[str, float]:
    """Return the `selection/` metrics of one batch.

    Args:
        plan: of the V global views.
        chosen: [B], row of `pair_table(V)` of each image.
        scores_BP: loss of every pair; None: not scored.
    """
    ious = crop_iou(plan.top, plan.left, plan.height, plan.width, pair_table(plan.num_views))
    metrics = {}
    for name, values in (("iou", ious), ("color_distance", color_distances(plan)), ("score", scores_BP)):
        if values is None:
            continue
        chosen_values = np.take_along_axis(values, chosen[:, None], axis=1)[:, 0].astype(np.float64)
        metrics[f"selection/chosen_{name}"] = float(chosen_values.mean())
        if values.shape[1] > 1:
            others = (values.sum(axis=1, dtype=np.float64) - chosen_values) / (values.shape[1] - 1)
            metrics[f"selection/other_{name}"] = float(others.mean())
    if ious.shape[1] > 1:
        metrics["selection/min_iou_share"] = float((ious.argmin(axis=1) == chosen).mean())
    return metrics
