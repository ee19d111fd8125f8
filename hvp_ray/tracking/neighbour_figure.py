"""The figure of nearest neighbours: some images, and what is nearest to each, by several encoders side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_CELL_INCHES = 0.82


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """The nearest images of N queries, by one encoder."""

    title: str
    images: NDArray[np.uint8]
    """[N, k, S, S, 3], the nearest first."""
    similarities: NDArray[np.float32]
    """[N, k], cosine similarity of the features."""


def draw_neighbours(path: Path, queries: NDArray[np.uint8], columns: list[Neighbours]) -> None:
    """Draw one line for each query: the query, then its neighbours by each encoder.

    Args:
        path: PNG to write.
        queries: [N, S, S, 3].
        columns: neighbours by each encoder.
    """
    num_lines, num_neighbours = columns[0].similarities.shape
    width = 1.0 + sum(0.4 + num_neighbours for _ in columns)
    figure = Figure(figsize=(width * _CELL_INCHES, (num_lines + 0.55) * _CELL_INCHES * 1.16), layout="constrained")
    ratios = [1.4, *[num_neighbours] * len(columns)]
    first, *blocks = figure.subfigures(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    first.suptitle("image", fontsize=9)
    for line, axis in enumerate(np.ravel(first.subplots(num_lines, 1))):
        _show(axis, queries[line], " ")
    for block, column in zip(blocks, columns, strict=True):
        block.suptitle(column.title, fontsize=9)
        axes = block.subplots(num_lines, num_neighbours, squeeze=False)
        for line in range(num_lines):
            for place in range(num_neighbours):
                similarity = f"{column.similarities[line, place]:.2f}"
                _show(axes[line][place], column.images[line, place], similarity)
    figure.savefig(path, dpi=110)


def _show(axis: Any, pixels: NDArray[np.uint8], text: str) -> None:
    axis.imshow(pixels)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(text, fontsize=7, labelpad=2)
