"""Smaller copies of rendered views for scoring: uint8 in, uint8 out, antialiased, on the device that holds them.

Scaling bytes moves an eighth of the memory that scaling normalised floats would. The result keeps the channels-last layout
that convolutions are fast in.
"""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


def downscale_views(
    pixels: UInt8[Tensor, "*batch height width channels"], size_px: int
) -> UInt8[Tensor, "*batch small_height small_width channels"]:
    """Return the views at `size_px` x `size_px`, bilinear with the filter widened to the scale, as torchvision does.

    A CPU uses torch's resampling of bytes. A GPU uses two matrix products in float16, which are faster than its resampling
    kernel. Both round to whole levels and differ by at most one.
    """
    if pixels.shape[-3:-1] == (size_px, size_px):
        return pixels
    if pixels.device.type != "cpu":
        return downscale_by_products(pixels, size_px, torch.float16)
    channels_first = pixels.flatten(0, -4).movedim(-1, -3)  # a view of the same memory
    small = F.interpolate(channels_first, size=(size_px, size_px), mode="bilinear", antialias=True)
    return small.movedim(-3, -1).unflatten(0, pixels.shape[:-3])


def downscale_by_products(
    pixels: UInt8[Tensor, "*batch height width channels"], size_px: int, dtype: torch.dtype
) -> UInt8[Tensor, "*batch small_height small_width channels"]:
    """Return what `downscale_views` returns, as (rows x height) @ view @ (width x columns), in `dtype`.

    float16 represents every level of a byte exactly, and weighted means to an eighth of a level.
    """
    *batch, height, width, channels = pixels.shape
    rows = _weights(height, size_px, pixels.device, dtype)
    columns = _weights(width, size_px, pixels.device, dtype)
    # Channels are the innermost axis: one product with a weight for each (pixel, channel) keeps them there.
    of_channels = torch.kron(columns.T.contiguous(), torch.eye(channels, device=pixels.device, dtype=dtype))
    narrow = pixels.reshape(-1, width * channels).to(dtype) @ of_channels
    small = rows @ narrow.view(-1, height, size_px * channels)
    return small.round_().to(torch.uint8).view(*batch, size_px, size_px, channels)


@functools.lru_cache(maxsize=16)
def _weights(size_px: int, small_px: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "small large"]:
    """Return the weight of every pixel of a line in every pixel of the smaller line, measured on unit impulses."""
    impulses = torch.eye(size_px, dtype=torch.float64)[:, None, None, :]
    line = F.interpolate(impulses, size=(1, small_px), mode="bilinear", antialias=True)
    return line[:, 0, 0].T.contiguous().to(device, dtype)
