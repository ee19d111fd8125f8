"""The figure of nearest neighbours: some images, and what is nearest to each, by several encoders side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hvp_ray.tracking.shown_pixels import as_shown

_CELL_INCHES = 1.0
_NAME_LETTERS = 16
_GAP = 0.1
"""Width of the gap before a block of neighbours, in cells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """The nearest images of N queries, by one encoder."""

    title: str
    images: NDArray[np.uint8]
    """[N, k, S, S, C], the nearest first."""
    names: list[list[str]]
    """Names of the images."""
    similarities: NDArray[np.float32]
    """[N, k], cosine similarity of the features."""


def draw_neighbours(path: Path, queries: NDArray[np.uint8], names: list[str], columns: list[Neighbours]) -> None:
    """Draw one line for each query: the query, then its neighbours by each encoder, with names and similarities.

    Args:
        path: PNG to write.
        queries: [N, S, S, C].
        names: N names.
        columns: neighbours by each encoder.
    """
    num_lines, num_neighbours = columns[0].similarities.shape
    block = [_GAP, *[1.0] * num_neighbours]
    ratios = [1.0, *block * len(columns)]
    size = (sum(ratios) * _CELL_INCHES, (1.3 * num_lines + 0.3) * _CELL_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_lines, len(ratios), squeeze=False, width_ratios=ratios)
    axes[0][0].set_title("image", fontsize=11)
    for line in range(num_lines):
        _show(axes[line][0], queries[line], f"{_shortened(names[line])}\n ")
        for index, column in enumerate(columns):
            gap, *cells = axes[line][1 + index * len(block) :][: len(block)]
            gap.set_axis_off()
            for place, cell in enumerate(cells):
                text = f"{_shortened(column.names[line][place])}\n{column.similarities[line, place]:.2f}"
                _show(cell, column.images[line, place], text)
    for index, column in enumerate(columns):
        axes[0][2 + index * len(block) + num_neighbours // 2].set_title(column.title, fontsize=11)
    figure.savefig(path, dpi=110)


def _show(axis: Any, pixels: NDArray[np.uint8], text: str) -> None:
    axis.imshow(as_shown(pixels))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(text, fontsize=7, labelpad=2, parse_math=False)


def _shortened(name: str) -> str:
    """Return a name with its middle left out if it is long; the ends tell files apart."""
    if len(name) <= _NAME_LETTERS:
        return name
    head = _NAME_LETTERS // 3
    return f"{name[:head]}…{name[head + 1 - _NAME_LETTERS :]}"
