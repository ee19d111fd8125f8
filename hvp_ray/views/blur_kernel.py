"""The kernel of a Gaussian blur, without negligible taps. Both renderers use it."""

import math

import numpy as np
from numpy.typing import NDArray

NEGLIGIBLE_WEIGHT = 1e-6
"""Taps at both ends are dropped while their total weight is below this: two passes then change a value by less than
0.001 levels."""


def gaussian_kernel(sigma_px: float, kernel_px: int) -> NDArray[np.float32]:
    """Return the normalised kernel, at most [kernel_px]: the density at whole pixels, as torchvision samples it.

    Its length is odd, and may be 1, which means no blur. It uses `math.exp`, because NumPy's differs in the last bit
    between CPUs with and without AVX-512.
    """
    half = [math.exp(-0.5 * (offset / sigma_px) ** 2) for offset in range(kernel_px // 2 + 1)]
    negligible = NEGLIGIBLE_WEIGHT * (half[0] + 2.0 * sum(half[1:]))
    left_out = 0.0
    while len(half) > 1 and left_out + 2.0 * half[-1] < negligible:
        left_out += 2.0 * half.pop()
    total = half[0] + 2.0 * sum(half[1:])
    return np.array([density / total for density in (*half[:0:-1], *half)], dtype=np.float32)
