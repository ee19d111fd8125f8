"""Images decoded once and cut to the box that their views use; shipped if views are rendered beside the trainer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.decode import decode_pixels
from hvp_ray.errors import UnreadableImageError
from hvp_ray.records import DecodedImages, ViewPlan


def used_boxes(plans: Sequence[ViewPlan]) -> NDArray[np.int32]:
    """Return the smallest box around all crops of each image, [B, 4]: top, left, height, width in px."""
    top, left = (np.min([getattr(plan, edge).min(axis=0) for plan in plans], axis=0) for edge in ("top", "left"))
    bottom = np.max([(plan.top + plan.height).max(axis=0) for plan in plans], axis=0)
    right = np.max([(plan.left + plan.width).max(axis=0) for plan in plans], axis=0)
    return np.stack([top, left, bottom - top, right - left], axis=1).astype(np.int32)


def decode_used(
    images: Sequence[bytes],
    global_plan: ViewPlan,
    local_plan: ViewPlan | None,
    *,
    data: DataConfig,
) -> DecodedImages:
    """Decode every image and keep the box that its views use; images that cannot be decoded are reported, never raised.

    Args:
        images: B encoded images.
        global_plan: [V, B].
        local_plan: [L, B]; None: no local views.
        data: limits, intensities and channels of images.
    """
    boxes = used_boxes([plan for plan in (global_plan, local_plan) if plan is not None])
    num_bytes = int((boxes[:, 2].astype(np.int64) * boxes[:, 3]).sum()) * data.channels
    decoded = DecodedImages(pixels=np.zeros(num_bytes, np.uint8), boxes=boxes, channels=data.channels, failures={})
    for index, (image, room) in enumerate(zip(images, decoded.images(), strict=True)):
        top, left, height, width = boxes[index].tolist()
        try:
            pixels = decode_pixels(image, data)
            room[...] = pixels[top : top + height, left : left + width]
        except UnreadableImageError as error:
            decoded.failures[index] = str(error)
    return decoded
