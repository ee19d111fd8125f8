"""Figures of a run: candidate views with the chosen pair framed, and curves of loss, overlap, collapse and k-NN."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from hvp_ray.records import ViewBatch, ViewPlan, Views
from hvp_ray.tracking.collapse import COLLAPSED_INFORMATION, COLLAPSED_STD
from hvp_ray.tracking.shown_pixels import as_shown
from hvp_ray.views.geometry import crop_iou

_CHOSEN, _OTHER = "#c1440e", "#4878a8"


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnChoice:
    """The images of a batch to draw, and the views chosen for them."""

    rows: NDArray[np.int64]
    """[N], indices of images in the batch."""
    pairs: NDArray[np.int64]
    """[P, 2], view indices."""
    chosen: NDArray[np.int64]
    """[B], row of `pairs`."""
    chosen_locals: NDArray[np.int64] | None
    """[k, B]; None: there are no local views."""
    scores_BP: NDArray[np.float32]  # noqa: N815 (shape letters)
    """Loss of each pair with its hardest local views."""


def draw_candidates(path: Path, batch: ViewBatch, originals: list[NDArray[np.uint8]], choice: DrawnChoice) -> None:
    """Draw images with their crops, their views with the chosen ones framed, and the score of every pair.

    Args:
        path: PNG to write.
        batch: the views of B images.
        originals: N decoded images.
        choice: the images to draw, and their chosen views.
    """
    plan = batch.global_views.plan
    num_views, num_images = plan.num_views, len(choice.rows)
    has_locals = batch.local_views is not None
    ious = crop_iou(plan.top, plan.left, plan.height, plan.width, choice.pairs)
    ratios = [1.0] * (num_views + 1) + ([1.6] if has_locals else []) + [1.5]
    figure = Figure(figsize=(1.9 * sum(ratios), 2.0 * num_images), layout="constrained")
    axes = figure.subplots(num_images, len(ratios), squeeze=False, width_ratios=ratios)
    for line, row in enumerate(choice.rows.tolist()):
        pair = choice.pairs[choice.chosen[row]]
        axes[line][0].imshow(as_shown(originals[line]))
        axes[line][0].set_axis_off()
        for view in range(num_views):
            _draw_crop(axes[line][0], plan, view, row, is_chosen=view in pair)
            _draw_view(axes[line][view + 1], batch.global_views, view, row, is_chosen=view in pair)
        if batch.local_views is not None:
            chosen_locals = set() if choice.chosen_locals is None else set(choice.chosen_locals[:, row].tolist())
            _draw_local_views(axes[line][num_views + 1], as_shown(batch.local_views.pixels[:, row]), chosen_locals)
        _draw_scores(axes[line][-1], choice.pairs, choice.scores_BP[row], ious[row], int(choice.chosen[row]))
    axes[0][0].set_title("image and crops", fontsize=11)
    if has_locals:
        axes[0][num_views + 1].set_title("local views", fontsize=11)
    axes[0][-1].set_title("loss of each pair, and its overlap", fontsize=11)
    figure.suptitle("Candidate views, scored with the final weights: the hardest choice is framed", fontsize=13)
    figure.savefig(path, dpi=110)


def _draw_crop(axis: Any, plan: ViewPlan, view: int, row: int, *, is_chosen: bool) -> None:
    axis.add_patch(
        Rectangle(
            (plan.left[view, row] - 0.5, plan.top[view, row] - 0.5),
            plan.width[view, row],
            plan.height[view, row],
            fill=False,
            edgecolor=_CHOSEN if is_chosen else _OTHER,
            linewidth=2.2 if is_chosen else 1.0,
            linestyle="-" if is_chosen else "--",
        )
    )


def _draw_view(axis: Any, views: Views, view: int, row: int, *, is_chosen: bool) -> None:
    pixels = as_shown(views.pixels[view, row])
    if views.plan.mask is not None:
        pixels = _grey_out(pixels, views.plan.mask[view, row])
    axis.imshow(pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_edgecolor(_CHOSEN if is_chosen else "#dddddd")
        spine.set_linewidth(4.0 if is_chosen else 1.0)
    axis.set_title(f"view {view}", fontsize=11, color=_CHOSEN if is_chosen else "#666666")


def _grey_out(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Cover the masked patches with grey, as a preview of the student's input."""
    cell_px = pixels.shape[0] // mask.shape[0]
    covered = mask.repeat(cell_px, axis=0).repeat(cell_px, axis=1)[..., None]
    return np.where(covered, pixels // 4 + 96, pixels).astype(np.uint8)


def _draw_local_views(axis: Any, views: NDArray[np.uint8], chosen: set[int]) -> None:
    """Draw local views [L, s, s, 3] as a mosaic."""
    count, size_px = views.shape[0], views.shape[1]
    columns = max(1, int(np.ceil(np.sqrt(1.6 * count))))
    lines, cell = -(-count // columns), size_px + max(2, size_px // 8)
    mosaic = np.full((lines * cell, columns * cell, 3), 255, np.uint8)
    for index in range(count):
        top, left = index // columns * cell, index % columns * cell
        mosaic[top : top + size_px, left : left + size_px] = views[index]
        is_chosen = index in chosen
        corner = (left - 0.5, top - 0.5)
        color, width = (_CHOSEN, 2.2) if is_chosen else ("#dddddd", 0.6)
        axis.add_patch(Rectangle(corner, size_px, size_px, fill=False, edgecolor=color, linewidth=width))
    axis.imshow(mosaic, interpolation="nearest")
    axis.set_axis_off()


def _draw_scores(
    axis: Any, pairs: NDArray[np.int64], scores: NDArray[np.float32], ious: NDArray[np.float32], chosen: int
) -> None:
    low = float(scores.min())
    span = max(float(scores.max()) - low, 1e-6)
    base = low - 0.15 * span
    colors = [_CHOSEN if index == chosen else "#b8c7d6" for index in range(len(pairs))]
    axis.barh(range(len(pairs)), scores - base, left=base, color=colors)
    for index, (score, iou) in enumerate(zip(scores, ious, strict=True)):
        axis.text(base + 0.02 * span, index, f"{score:.3f}   IoU {iou:.2f}", va="center", fontsize=9)
    axis.set_yticks(range(len(pairs)), [f"{m}-{n}" for m, n in pairs.tolist()], fontsize=9.5)
    axis.invert_yaxis()
    axis.set_xticks([])
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Curves:
    """A figure of metrics over the steps."""

    title: str
    y_label: str
    needs: str
    """The figure is drawn if the journal has this metric."""
    series: dict[str, tuple[str, str]]
    """Metric -> label, colour."""
    levels: dict[str, float] = field(default_factory=dict)
    """Label -> height of a dotted line."""
    markers: bool = False
    """Show each point, because there are few."""


_CURVES = {
    "overlap.png": _Curves(
        title="Overlap of the crops of chosen and other pairs",
        y_label="IoU",
        needs="selection/other_iou",
        series={
            "selection/chosen_iou": ("chosen pair", _CHOSEN),
            "selection/other_iou": ("other pairs, mean", _OTHER),
        },
    ),
    "loss.png": _Curves(
        title="Loss",
        y_label="loss",
        needs="train/loss",
        series={
            "train/loss": ("training loss, chosen views", _CHOSEN),
            "selection/other_score": ("scoring pass: other candidates, mean", _OTHER),
        },
    ),
    "collapse.png": _Curves(
        title="Collapse watch: embeddings",
        y_label="standard deviation x sqrt(D)",
        needs="collapse/embedding_std",
        series={"collapse/embedding_std": ("embeddings of a batch; 1 is isotropic, 0 is collapse", _OTHER)},
        levels={"a warning below": COLLAPSED_STD},
    ),
    "teacher.png": _Curves(
        title="Collapse watch: teacher",
        y_label="nats",
        needs="collapse/teacher_information",
        series={"collapse/teacher_information": ("information of the output about the image", _OTHER)},
        levels={"a warning below": COLLAPSED_INFORMATION},
    ),
}

_KNN = _Curves(
    title="k-NN accuracy on test images",
    y_label="accuracy",
    needs="eval/knn_top1",
    series={"eval/knn_top1": ("all labels", _CHOSEN), "eval/knn5shot_top1": ("5 labels per class", _OTHER)},
    markers=True,
)


def draw_curves(folder: Path, records: list[dict[str, Any]]) -> list[Path]:
    """Draw loss, overlap and collapse over the steps from the log's records of metrics; return the files written."""
    drawn = {name: c for name, c in _CURVES.items() if any(c.needs in record["metrics"] for record in records)}
    for name, curves in drawn.items():
        _draw_curves(folder / name, records, curves)
    return [folder / name for name in drawn]


def draw_knn_curve(path: Path, records: list[dict[str, Any]], levels: dict[str, float]) -> None:
    """Draw the k-NN accuracy over the steps, if there is more than one point.

    Args:
        path: PNG to write.
        records: the log's evaluations.
        levels: label -> accuracy of something else, with all labels.
    """
    if len(records) > 1:
        _draw_curves(path, records, replace(_KNN, levels=levels))


def _draw_curves(path: Path, records: list[dict[str, Any]], curves: _Curves) -> None:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, (label, color) in curves.series.items():
        points = [(r["step"], r["metrics"][name]) for r in records if name in r["metrics"]]
        if not points:
            continue
        steps, values = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
        if curves.markers:
            axis.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=4, label=label)
            continue
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(*_moving_average(steps, values), color=color, linewidth=1.8, label=label)
    for (label, height), color in zip(curves.levels.items(), ("#777777", "#b0a060"), strict=False):
        axis.axhline(height, color=color, linestyle=":", linewidth=1.2, label=label)
    axis.set_title(curves.title, fontsize=10)
    axis.set_xlabel("step (optimizer updates)")
    axis.set_ylabel(curves.y_label)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _moving_average(
    steps: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    window = max(1, min(len(values) // 10, 50))
    kernel = np.ones(window) / window
    return np.convolve(steps, kernel, mode="valid"), np.convolve(values, kernel, mode="valid")
