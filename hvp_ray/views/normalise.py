"""Normalisation on the device: uint8 HWC pixels to float32 network inputs."""

import functools

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hvp_ray.config import ViewsConfig


def normalise_views(
    pixels: UInt8[Tensor, "*batch height width channels"], views: ViewsConfig
) -> Float[Tensor, "*batch channels height width"]:
    """Return (pixels / 255 - mean) / std as channels first in shape, channels last in memory."""
    make = _kept if pixels.device.type == "cuda" else _in_levels
    mean, std = make(views.mean, pixels.device), make(views.std, pixels.device)
    return torch.sub(pixels, mean).div_(std).movedim(-1, -3)  # allocates one tensor of floats


def _in_levels(fractions: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(fractions, device=device) * 255.0


_kept = functools.lru_cache(maxsize=16)(_in_levels)  # a copy to a GPU would block the host
