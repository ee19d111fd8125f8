"""Pixels of any number of channels as a figure shows them."""

import numpy as np
from numpy.typing import NDArray


def as_shown(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return [..., 3] of [..., C]: one channel as grey, else the first three as red, green and blue (of two, no blue)."""
    match pixels.shape[-1]:
        case 1:
            return np.repeat(pixels, 3, axis=-1)
        case 2:
            return np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=-1)
    return pixels[..., :3]
