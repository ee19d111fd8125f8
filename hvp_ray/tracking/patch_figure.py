"""Figure of what a Vision Transformer attends to, and of its patch features."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hvp_ray.evaluation.patch_maps import PatchMaps
from hvp_ray.tracking.shown_pixels import as_shown

MAX_HEADS = 12


def draw_patch_maps(path: Path, pixels: NDArray[np.uint8], maps: PatchMaps) -> None:
    """Draw one row per image: the image, its patch features as colours, the mean attention and that of each head.

    Args:
        path: PNG to write.
        pixels: [N, S, S, C], the images.
        maps: their maps; heads beyond `MAX_HEADS` are not drawn.
    """
    heads = min(maps.attention.shape[1], MAX_HEADS)
    columns = 3 + heads
    figure = Figure(figsize=(1.15 * columns, 1.2 * len(pixels) + 0.5), layout="constrained")
    axes = figure.subplots(len(pixels), columns, squeeze=False)
    for line, (image, attention, colours) in enumerate(zip(pixels, maps.attention, maps.components, strict=True)):
        cells = [as_shown(image), colours, attention.mean(axis=0), *attention[:heads]]
        for axis, cell in zip(axes[line], cells, strict=True):
            axis.imshow(cell, interpolation="nearest", cmap="magma", vmin=0.0 if cell.ndim == 2 else None)
            axis.set_axis_off()
    titles = ["image", "patch features", "mean attention", *(f"head {head}" for head in range(heads))]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    figure.suptitle(
        "Last block: principal components of the patch features as colours, and attention of the class token\n"
        "(each map from 0 to its largest value)",
        fontsize=8,
    )
    figure.savefig(path, dpi=130)
