"""Figures of a selection analysis: chosen pairs against the others. `hvp-ray analyse` draws them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hvp_ray.tracking.logged_pairs import FEATURES, MEASURES
from hvp_ray.tracking.selection_analysis import Period, SelectionAnalysis
from hvp_ray.tracking.selection_models import AUTHORS_FANOVA, ChoiceModel, ScoreModel

_CHOSEN, _OTHER, _GREY = "#c1440e", "#4878a8", "#777777"
_TITLES = {"iou": "IoU", "corner_distance": "corner distance", "area_ratio": "smaller / larger area"}


def draw_selection_figures(folder: Path, analysis: SelectionAnalysis) -> list[Path]:
    """Draw all figures of an analysis into a folder; return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "selection_iou.png": _draw_iou(analysis),
        "selection_min_iou_share.png": _draw_min_iou_share(analysis),
        "selection_color.png": _draw_color(analysis),
        "selection_iou_histogram.png": _draw_iou_histogram(analysis),
    }
    if analysis.choice_model is not None:
        figures["selection_importance.png"] = _draw_importance(analysis.choice_model, analysis.score_model)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


def _draw_iou(analysis: SelectionAnalysis) -> Figure:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axis = figure.subplots()
    _plot_contrast(axis, analysis, "iou")
    axis.set_title("Overlap of the crops of chosen and other pairs", fontsize=10)
    axis.set_ylabel("IoU (px of the original image)")
    return figure


def _draw_min_iou_share(analysis: SelectionAnalysis) -> Figure:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axis = figure.subplots()
    _plot_over_time(axis, analysis, lambda period: 100 * period.min_iou_share, _CHOSEN, "chosen pair has the least IoU")
    chance = 100 * analysis.chance
    axis.axhline(chance, color=_GREY, linestyle="--", linewidth=1.2, label=f"chance, {chance:.1f} %")
    axis.set_title("How often the chosen pair overlaps least", fontsize=10)
    axis.set_ylabel("fraction of the images, %")
    axis.set_ylim(bottom=0)
    _finish_over_time(axis, analysis)
    return figure


def _draw_color(analysis: SelectionAnalysis) -> Figure:
    figure = Figure(figsize=(10.0, 3.6), layout="constrained")
    axis, bars = figure.subplots(1, 2, width_ratios=[1.5, 1.0])
    _plot_contrast(axis, analysis, "color_distance")
    axis.set_title("Colour distance of chosen and other pairs", fontsize=10)
    axis.set_ylabel("distance of the jitter's factors")

    names = [name for name in MEASURES if name.endswith("_differs")]
    measures = [analysis.last_third.measures[name] for name in names]
    for offset, color, label, values in (
        (-0.2, _CHOSEN, "chosen pair", [100 * m.chosen for m in measures]),
        (0.2, _OTHER, "other pairs, mean", [100 * m.other for m in measures]),
    ):
        drawn = bars.bar([x + offset for x in range(len(names))], values, width=0.38, color=color, label=label)
        bars.bar_label(drawn, fmt="%.1f", fontsize=7, padding=2)
    bars.set_xticks(range(len(names)), [name.removesuffix("_differs") for name in names], fontsize=9)
    bars.set_title("Pairs of which only one view has it", fontsize=10)
    bars.set_ylabel("fraction of the pairs, % (last third)")
    highest = max(100 * max(m.chosen, m.other) for m in measures)
    bars.set_ylim(0, max(1.35 * highest, 1.0))
    bars.grid(axis="y", alpha=0.25)
    bars.set_axisbelow(True)
    bars.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    return figure


def _draw_iou_histogram(analysis: SelectionAnalysis) -> Figure:
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axis = figure.subplots()
    histogram, last = analysis.iou_histogram, analysis.last_third
    means = last.measures["iou"]
    for shares, color, label, mean in (
        (histogram.chosen_share, _CHOSEN, "chosen pair", means.chosen),
        (histogram.other_share, _OTHER, "other pairs", means.other),
    ):
        percent = [100 * share for share in shares]
        axis.stairs(percent, histogram.edges, fill=True, color=color, alpha=0.25)
        axis.stairs(percent, histogram.edges, color=color, linewidth=1.8, label=f"{label}, mean {mean:.3f}")
        axis.axvline(mean, color=color, linestyle="--", linewidth=1.0)
    axis.set_xlim(0.0, 1.0)
    axis.set_ylim(bottom=0.0)
    axis.set_title(
        f"Overlap of the crops, last third of the run (steps {last.first_step} to {last.last_step})", fontsize=10
    )
    axis.set_xlabel("IoU (px of the original image)")
    axis.set_ylabel(f"fraction of the pairs in a bin of {histogram.edges[1]:.2f}, %")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _draw_importance(choice: ChoiceModel, score: ScoreModel | None) -> Figure:
    figure = Figure(figsize=(7.0 if score is None else 12.0, 5.0), layout="constrained")
    axes = figure.subplots(1, 1 if score is None else 2, squeeze=False)[0]
    _draw_choice_model(axes[0], choice)
    if score is not None:
        _draw_score_model(axes[1], score)
    for axis in axes:
        axis.set_yticks(range(len(FEATURES)), [_title(name) for name in FEATURES], fontsize=8)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.25)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def _title(feature: str) -> str:
    if feature.endswith("_differs"):
        return feature.replace("_", " ")
    return _TITLES.get(feature, f"{feature} difference")


def _draw_choice_model(axis: Any, model: ChoiceModel) -> None:
    coefficients = [model.features[name].coefficient for name in FEATURES]
    signs = ((_CHOSEN, "more of it is chosen", 1.0), (_OTHER, "less of it is chosen", -1.0))
    for color, label, sign in signs:
        widths = [value if value * sign > 0 else 0.0 for value in coefficients]
        axis.barh(range(len(FEATURES)), widths, color=color, label=label)
    reach = max(*map(abs, coefficients), 0.1)
    for line, value in enumerate(coefficients):
        side, offset = ("left", 0.02) if value >= 0 else ("right", -0.02)
        axis.text(value + offset * reach, line, f"{value:+.2f}", va="center", ha=side, fontsize=7)
    axis.axvline(0.0, color=_GREY, linewidth=0.8)
    axis.set_xlim(-1.3 * reach, 1.3 * reach)
    axis.set_title(
        f"Which pair is chosen: model {model.accuracy:.1%} right,\n"
        f"least IoU {model.min_iou_accuracy:.1%}, chance {model.chance:.1%} ({model.num_held_out:,} images held out)",
        fontsize=10,
    )
    axis.set_xlabel("log-odds of being chosen, per standard deviation")


def _draw_score_model(axis: Any, model: ScoreModel) -> None:
    lines = range(len(FEATURES))
    for offset, color, label, attribute in (
        (-0.2, _CHOSEN, "main effect (as fANOVA; fraction of the forest's variance)", "main_effect"),
        (0.2, _OTHER, "lost by shuffling (fraction of the scores' variance)", "permutation"),
    ):
        values = [getattr(model.features[name], attribute) for name in FEATURES]
        axis.barh([line + offset for line in lines], values, height=0.38, color=color, label=label)
    axis.scatter(
        [AUTHORS_FANOVA[name] for name in FEATURES if name in AUTHORS_FANOVA],
        [line - 0.2 for line in lines if FEATURES[line] in AUTHORS_FANOVA],
        marker="D",
        s=18,
        color="black",
        zorder=3,
        label="fANOVA of the HVP authors (ImageNet, ResNet-50)",
    )
    axis.set_title(
        f"What makes a pair hard: forest, {model.r2:.1%} of the\n"
        f"scores' variance within images explained ({model.num_held_out:,} images held out)",
        fontsize=10,
    )
    axis.set_xlabel("importance, fraction of the variance")


def _timeline(analysis: SelectionAnalysis) -> list[Period]:
    """Return the parts of the first logged epoch, then the other epochs."""
    return [*analysis.first_epoch, *analysis.per_epoch[1:]]


def _plot_contrast(axis: Any, analysis: SelectionAnalysis, name: str) -> None:
    """Plot a measure of chosen and other pairs, with a band of two standard errors of their difference."""
    periods = _timeline(analysis)
    _plot_over_time(axis, analysis, lambda period: period.measures[name].chosen, _CHOSEN, "chosen pair")
    _plot_over_time(axis, analysis, lambda period: period.measures[name].other, _OTHER, "other pairs, mean")
    contrasts = [period.measures[name] for period in periods]
    axis.fill_between(
        [period.epochs_done for period in periods],
        [c.chosen - 2 * (c.standard_error or 0.0) for c in contrasts],
        [c.chosen + 2 * (c.standard_error or 0.0) for c in contrasts],
        color=_CHOSEN,
        alpha=0.15,
        linewidth=0,
        label="two standard errors of the difference",
    )
    _finish_over_time(axis, analysis)


def _plot_over_time(
    axis: Any, analysis: SelectionAnalysis, value: Callable[[Period], float], color: str, label: str
) -> None:
    periods = _timeline(analysis)
    steps, values = [period.epochs_done for period in periods], [value(period) for period in periods]
    marker = "o" if len(periods) <= 40 else None
    axis.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=label)


def _finish_over_time(axis: Any, analysis: SelectionAnalysis) -> None:
    axis.set_xlabel(f"epochs done (1 epoch = {analysis.steps_per_epoch:,} steps)")
    axis.set_xlim(left=min(0.0, analysis.first_epoch[0].epochs_done))
    axis.margins(y=0.12)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
