"""The figure of hardness kept against price: a panel for each run, a curve for each knob."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results_file import Result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Style:
    label: str
    """In the legend; empty: the labels of the points say it."""
    color: str
    side: int = 1
    """Labels are left (-1) or right (1) of the points."""
    text: str = "{}"
    """Of the labels."""


_STYLES = {
    "views": _Style(label="hardest candidate of n global views", color="#c1440e", text="{} views"),
    "limit": _Style(label="hardest of n random candidates (the authors: 64, 128)", color="#1d3f63", text="limit {}"),
    "quantile": _Style(label="quantile n of the candidates", color="#8e6bbf", side=-1),
    "rescue": _Style(label="two views scored, all views of the easiest n of the images", color="#3a9d9d"),
    "share": _Style(label="all views scored of n of the images; as hard every 1/n steps", color="#777777"),
    "plans": _Style(label="predicted among the pairs of n plans, 16 images probed", color="#6b8e23", side=-1),
    "probes": _Style(label="predicted, n images probed", color="#a3b86c"),
    "softmax": _Style(label="all pairs: softmax of temperature n", color="#c9a227"),
    "top_k": _Style(
        label="all pairs: the n hardest; hardest matching; hardest partner of each view", color="#a05a7c", side=-1
    ),
    "matching": _Style(label="", color="#a05a7c", side=-1, text="matching"),
    "partner": _Style(label="", color="#a05a7c", side=-1, text="partner"),
    "min_iou": _Style(label="", color="#4878a8", side=-1, text="least overlap"),
}


def draw_hardness(path: Path, panels: Mapping[str, Sequence[Result]]) -> None:
    """Draw the results of several runs, by the title of their panel."""
    figure = Figure(figsize=(8.0 * len(panels), 7.5), layout="constrained")
    for axis, (title, results) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_run(axis, results)
        axis.set_title(title, fontsize=10)
    lines = {str(line.get_label()): line for axis in figure.axes for line in axis.get_lines()}
    lines = {label: line for label, line in lines.items() if not label.startswith("_")}  # matplotlib's own are hidden
    columns = 1 + len(panels)
    figure.legend(
        list(lines.values()), list(lines), frameon=False, fontsize=8, loc="outside lower center", ncols=columns
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_run(axis: Axes, results: Sequence[Result]) -> None:
    axis.axhline(0.0, color="#999999", linewidth=0.8)
    axis.axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    labels = []
    for knob, style in _STYLES.items():
        points = sorted((p for p in results if p["knob"] == knob), key=lambda p: (p["price"], p["value"]))
        if not points:
            continue
        prices, kept = [p["price"] for p in points], [p["value"] for p in points]
        axis.plot(prices, kept, "o-", color=style.color, markersize=4, linewidth=1.3, label=style.label or None)
        axis.vlines(prices, [p["low"] for p in points], [p["high"] for p in points], color=style.color, linewidth=1.0)
        labels += [(p["price"], p["value"], style.text.format(p["setting"]), style) for p in points]
    axis.grid(alpha=0.25)
    axis.margins(x=0.13)
    axis.set_xlabel("price of a step, in steps of random views (operations counted)")
    axis.set_ylabel("hardness kept (0: random pair, 1: hardest)")
    _write_apart(axis, labels)


def _write_apart(axis: Axes, labels: Sequence[tuple[float, float, str, _Style]]) -> None:
    """Write each label beside its point, moved up as far as the labels below it need."""
    low, high = axis.get_ylim()
    gap, written = 0.022 * (high - low), list[tuple[float, int, float]]()
    for price, kept, text, style in sorted(labels, key=lambda label: label[1]):
        beside = [y for x, side, y in written if side == style.side and abs(x - price) < 0.05]
        y = max([kept, *(y + gap for y in beside)])
        written.append((price, style.side, y))
        axis.annotate(
            text,
            (price, y),
            xytext=(6 * style.side, 0),
            textcoords="offset points",
            ha="left" if style.side > 0 else "right",
            va="center",
            fontsize=8,
            color=style.color,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        )
