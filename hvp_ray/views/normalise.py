"""uint8 HWC pixels -> normalised float32 network inputs, on the device."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hvp_ray.config import ViewsConfig


def normalise_views(
    pixels: UInt8[Tensor, "*batch height width channels"], views: ViewsConfig
) -> Float[Tensor, "*batch channels height width"]:
    """Return (pixels / 255 - mean) / std as channels first in shape, channels last in memory."""
    mean = torch.tensor(views.mean, device=pixels.device) * 255.0
    std = torch.tensor(views.std, device=pixels.device) * 255.0
    return ((pixels.float() - mean) / std).movedim(-1, -3)
