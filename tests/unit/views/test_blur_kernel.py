"""The blur's kernel: torchvision's, without the taps that change nothing."""

import numpy as np
import pytest
from numpy.typing import NDArray

from hvp_ray.views.blur_kernel import gaussian_kernel
from hvp_ray.views.render_cpu import blur


def _blurred(image: NDArray[np.uint8], kernel: NDArray[np.float32]) -> NDArray[np.float64]:
    blurred = np.empty_like(image)
    blur(image, blurred, kernel=kernel)
    return blurred.astype(np.float64)


def test_kernel_without_negligible_taps_blurs_as_the_whole_one(generator: np.random.Generator) -> None:
    """The taps left out weigh so little that a value changes where it lay beside a rounding tie, and nowhere else."""
    noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    lengths = []
    for sigma_px in (0.1, 0.18, 0.3, 0.6, 1.0, 1.5, 2.0):
        offsets = np.arange(-11, 12)
        density = np.exp(-0.5 * (offsets / sigma_px) ** 2)
        whole = (density / density.sum()).astype(np.float32)
        kernel = gaussian_kernel(sigma_px, 23)
        lengths.append(len(kernel))
        assert kernel.sum() == pytest.approx(1.0, abs=1e-6)
        assert np.array_equal(kernel, kernel[::-1])
        left_out = (23 - len(kernel)) // 2
        assert np.abs(kernel - whole[left_out : 23 - left_out]).max() < 1e-6
        difference = np.abs(_blurred(noise, kernel) - _blurred(noise, whole))
        assert difference.max() <= 1
        assert difference.mean() < 0.001
    assert lengths == [1, 1, 3, 7, 11, 15, 21]
    assert len(gaussian_kernel(2.0, 9)) == 9
