"""Figures of a comparison: accuracy over epochs and over compute, final values, and differences with intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hvp_ray.comparison.arms import HARDEST, VANILLA, VANILLA_LONG
from hvp_ray.comparison.results import MetricResult, RunResult
from hvp_ray.comparison.study import Study

_COLORS = {HARDEST: "#c1440e", VANILLA: "#4878a8", VANILLA_LONG: "#1d3f63"}
_CONTROL_COLORS = ("#6b8e23", "#8e6bbf", "#c9a227", "#3a9d9d", "#a05a7c", "#777777")


def draw_comparison(folder: Path, study: Study, results: Sequence[RunResult], metric: MetricResult) -> list[Path]:
    """Draw the figures of one metric into a folder; return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"result.png": _draw_result(study, metric)}
    if any(result.curve for result in results) and metric.metric in results[0].curve[0].values:
        compute = f"compute (epochs of random views, {study.accounting})"
        figures["knn_over_epochs.png"] = _draw_curves(study, results, metric, "epoch", "epochs")
        figures["knn_over_compute.png"] = _draw_curves(study, results, metric, "compute", compute)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


def _colors_of(study: Study) -> dict[str, str]:
    others = [arm.name for arm in study.arms if arm.name not in _COLORS]
    return _COLORS | {name: _CONTROL_COLORS[i % len(_CONTROL_COLORS)] for i, name in enumerate(others)}


def _draw_curves(
    study: Study, results: Sequence[RunResult], metric: MetricResult, position: str, x_label: str
) -> Figure:
    """Draw accuracies over `position`, an attribute of `CurvePoint`: single seeds thin, their mean thick."""
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axis = figure.subplots()
    for arm in study.arms:
        curves = [{p.step: p for p in result.curve} for result in results if result.arm == arm.name and result.curve]
        if not curves:
            continue
        color = _colors_of(study)[arm.name]
        for curve in curves:
            x = [getattr(point, position) for point in curve.values()]
            axis.plot(
                x, [100 * p.values[metric.metric] for p in curve.values()], color=color, alpha=0.25, linewidth=0.8
            )
        common = [step for step in curves[0] if all(step in curve for curve in curves)]  # an evaluation may have failed
        axis.plot(
            [getattr(curves[0][step], position) for step in common],
            [np.mean([100 * curve[step].values[metric.metric] for curve in curves]) for step in common],
            color=color,
            linewidth=2.0,
            marker="o",
            markersize=3,
            linestyle="--" if arm.is_control else "-",
            label=arm.name,
        )
    for name, value in metric.references.items():
        if name.startswith("raw pixels"):
            axis.axhline(100 * value, color="#999999", linewidth=1.0, linestyle=":", label=name)
    title = "Equal compute" if position == "compute" else "Equal epochs"
    axis.set_title(f"{title}: {metric.title}, mean and single seeds", fontsize=10)
    axis.set_xlabel(x_label)
    axis.set_ylabel("accuracy, %")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    return figure


def _draw_result(study: Study, metric: MetricResult) -> Figure:
    """Draw final values of all seeds, and the differences with their intervals."""
    colors = _colors_of(study)
    height = 1.6 + 0.36 * max(len(metric.arms), len(metric.differences))
    figure = Figure(figsize=(10.5, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    for line, arm in enumerate(metric.arms):
        values = [100 * value for value in arm.by_seed.values()]
        left.plot(values, [line] * len(values), "o", color=colors[arm.arm], alpha=0.45, markersize=5)
        left.plot([100 * arm.mean], [line], "|", color=colors[arm.arm], markersize=16, markeredgewidth=2.5)
    _label(left, [arm.arm for arm in metric.arms], f"{metric.title}, %", "Final accuracy: seeds and mean")
    for line, difference in enumerate(metric.differences):
        color = colors[difference.arm]
        if difference.test is not None and difference.has_interval:
            interval = difference.test.interval
            right.plot([100 * interval.low, 100 * interval.high], [line, line], color=color, linewidth=2.0)
        right.plot([100 * difference.mean], [line], "o", color=color, markersize=6)
    right.axvline(0.0, color="#999999", linewidth=1.0)
    names = [f"{d.arm} - {d.reference}" for d in metric.differences]
    _label(right, names, "difference, points (95 % interval over paired seeds)", "Against random views")
    return figure


def _label(axis: Axes, lines: Sequence[str], x_label: str, title: str) -> None:
    axis.set_yticks(range(len(lines)), lines, fontsize=8)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.set_xlabel(x_label)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.25)
