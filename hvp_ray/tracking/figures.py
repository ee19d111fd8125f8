"""Pictures of a run: candidate views with the chosen pair framed, overlap of chosen and other pairs, the loss."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from hvp_ray.records import ViewBatch
from hvp_ray.selection.candidates import pair_table
from hvp_ray.views.geometry import crop_iou

_CHOSEN, _OTHER = "#c1440e", "#4878a8"


def draw_candidates(
    path: Path,
    batch: ViewBatch,
    rows: NDArray[np.int64],
    originals: list[NDArray[np.uint8]],
    chosen: NDArray[np.int64],
    scores_BP: NDArray[np.float32],
) -> None:
    """Draw images with their crops, their V views with the chosen pair framed, and the score of every pair.

    Args:
        path: PNG to write.
        batch: the views of B images.
        rows: [N], which of the B images are drawn.
        originals: N decoded images.
        chosen: [B], row of `pair_table(V)`.
        scores_BP: loss that each pair would give.
    """
    views, plan = batch.global_views.pixels, batch.global_views.plan
    num_views, num_images = views.shape[0], len(rows)
    pairs = pair_table(num_views)
    ious = crop_iou(plan.top, plan.left, plan.height, plan.width, pairs)
    figure, axes = plt.subplots(
        num_images,
        num_views + 2,
        figsize=(1.9 * (num_views + 2) + 0.6, 2.0 * num_images),
        squeeze=False,
        width_ratios=[1.0] * (num_views + 1) + [1.5],
        layout="constrained",
    )
    for line, row in enumerate(rows.tolist()):
        pair = pairs[chosen[row]]
        original = axes[line][0]
        original.imshow(originals[line])
        original.set_axis_off()
        for view in range(num_views):
            is_chosen = view in pair
            color = _CHOSEN if is_chosen else _OTHER
            corner = (plan.left[view, row] - 0.5, plan.top[view, row] - 0.5)
            original.add_patch(
                Rectangle(
                    corner, plan.width[view, row], plan.height[view, row], fill=False, edgecolor=color,
                    linewidth=2.2 if is_chosen else 1.0, linestyle="-" if is_chosen else "--",
                )
            )  # fmt: skip
            axis = axes[line][view + 1]
            axis.imshow(views[view, row], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_edgecolor(_CHOSEN if is_chosen else "#dddddd")
                spine.set_linewidth(4.0 if is_chosen else 1.0)
            axis.set_title(f"view {view}", fontsize=8, color=color if is_chosen else "#666666")
        _draw_scores(axes[line][-1], pairs, scores_BP[row], ious[row], int(chosen[row]))
    axes[0][0].set_title("image and crops", fontsize=8)
    axes[0][-1].set_title("loss of each pair, and its overlap", fontsize=8)
    figure.suptitle("Candidate views, scored with the final weights: the hardest pair is framed", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_scores(
    axis: Any, pairs: NDArray[np.int64], scores: NDArray[np.float32], ious: NDArray[np.float32], chosen: int
) -> None:
    low = float(scores.min())
    span = max(float(scores.max()) - low, 1e-6)
    base = low - 0.15 * span
    colors = [_CHOSEN if index == chosen else "#b8c7d6" for index in range(len(pairs))]
    axis.barh(range(len(pairs)), scores - base, left=base, color=colors)
    for index, (score, iou) in enumerate(zip(scores, ious, strict=True)):
        axis.text(base + 0.02 * span, index, f"{score:.3f}   IoU {iou:.2f}", va="center", fontsize=6.5)
    axis.set_yticks(range(len(pairs)), [f"{m}-{n}" for m, n in pairs.tolist()], fontsize=7)
    axis.invert_yaxis()
    axis.set_xticks([])
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def draw_curves(folder: Path, records: list[dict[str, Any]]) -> list[Path]:
    """Draw overlap and loss over the steps from the journal's records; return the files written."""
    written = []
    if any("selection/other_iou" in record["metrics"] for record in records):
        path = folder / "overlap.png"
        _draw_series(
            path,
            records,
            {"selection/chosen_iou": ("chosen pair", _CHOSEN), "selection/other_iou": ("other pairs, mean", _OTHER)},
            title="Overlap of the crops of chosen and other pairs",
            y_label="IoU",
        )
        written.append(path)
    if any("train/loss" in record["metrics"] for record in records):
        path = folder / "loss.png"
        series = {"train/loss": ("training loss, chosen pairs", _CHOSEN)}
        if any("selection/other_score" in record["metrics"] for record in records):
            series["selection/other_score"] = ("scoring pass: other pairs, mean", _OTHER)
        _draw_series(path, records, series, title="Loss", y_label="negative cosine similarity")
        written.append(path)
    return written


def _draw_series(
    path: Path, records: list[dict[str, Any]], series: dict[str, tuple[str, str]], *, title: str, y_label: str
) -> None:
    figure, axis = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
    for name, (label, color) in series.items():
        points = [(r["step"], r["metrics"][name]) for r in records if name in r["metrics"]]
        if not points:
            continue
        steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(*_moving_average(steps, values), color=color, linewidth=1.8, label=label)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step (optimizer updates)")
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _moving_average(
    steps: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    window = max(1, min(len(values) // 10, 50))
    kernel = np.ones(window) / window
    return np.convolve(steps, kernel, mode="valid"), np.convolve(values, kernel, mode="valid")
