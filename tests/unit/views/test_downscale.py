"""Smaller copies for scoring: against torch's exact resampling of floats, on photograph-like and random pixels."""

import pytest
import torch
import torch.nn.functional as F

from hvp_ray.views.downscale import downscale_by_products, downscale_views


def _pixels(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randint(0, 256, (2, 3, 224, 224, 3), dtype=torch.uint8, generator=generator)
    coarse = torch.rand(6, 3, 7, 7, generator=generator) * 255
    smooth = F.interpolate(coarse, size=(224, 224), mode="bicubic").clamp(0, 255).to(torch.uint8)
    return smooth.movedim(1, -1).contiguous().unflatten(0, (2, 3))


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("size_px", [112, 96, 80, 64, 1])
def test_both_ways_are_the_antialiased_scaling_of_floats(kind: str, size_px: int) -> None:
    pixels = _pixels(kind)
    exact = F.interpolate(
        pixels.flatten(0, 1).movedim(-1, 1).double(), size=(size_px, size_px), mode="bilinear", antialias=True
    )
    exact = exact.movedim(1, -1).unflatten(0, (2, 3))
    for worst, small in {
        1.05: downscale_views(pixels, size_px),  # rounds after each of the two directions
        0.75: downscale_by_products(pixels, size_px, torch.float16),
        0.5001: downscale_by_products(pixels, size_px, torch.float32),
    }.items():
        assert small.shape == exact.shape
        assert small.dtype == torch.uint8
        assert small.is_contiguous()
        assert (small.double() - exact).abs().max() <= worst


def test_extremes_stay() -> None:
    for level in (0, 255):
        pixels = torch.full((1, 2, 224, 224, 3), level, dtype=torch.uint8)
        assert (downscale_views(pixels, 96) == level).all()
        assert (downscale_by_products(pixels, 96, torch.float16) == level).all()


def test_a_view_is_scaled_alike_alone_and_in_a_batch() -> None:
    pixels = _pixels("noise")
    assert torch.equal(downscale_views(pixels, 96)[1:, :2], downscale_views(pixels[1:, :2], 96))


def test_full_size_is_the_very_tensor() -> None:
    pixels = _pixels("noise")
    assert downscale_views(pixels, 224) is pixels
