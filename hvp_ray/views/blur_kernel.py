"""The kernel of a Gaussian blur, without the taps that change nothing. Both renderers take it from here."""

import math

import numpy as np
from numpy.typing import NDArray

NEGLIGIBLE_WEIGHT = 1e-6
"""Taps at the ends that weigh less together are left out: in two passes a value changes by less than 0.001 levels."""


def gaussian_kernel(sigma_px: float, kernel_px: int) -> NDArray[np.float32]:
    """Return the normalised kernel, at most [kernel_px]: the density at whole pixels, as torchvision samples it.

    Negligible taps are left out at both ends, so the length is odd and may be 1, which means no blur. (`math.exp` and not
    NumPy's, which differs in the last bit between CPUs with and without AVX-512.)
    """
    half = [math.exp(-0.5 * (offset / sigma_px) ** 2) for offset in range(kernel_px // 2 + 1)]
    negligible = NEGLIGIBLE_WEIGHT * (half[0] + 2.0 * sum(half[1:]))
    left_out = 0.0
    while len(half) > 1 and left_out + 2.0 * half[-1] < negligible:
        left_out += 2.0 * half.pop()
    total = half[0] + 2.0 * sum(half[1:])
    return np.array([density / total for density in (*half[:0:-1], *half)], dtype=np.float32)
