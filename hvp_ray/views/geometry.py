"""Crops: drawing them, and the overlap of two of them. Pure NumPy."""

import math

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import TransformConfig

CROP_ATTEMPTS = 10
"""torchvision's RandomResizedCrop tries ten times before it falls back to a centre crop."""

CROP_WORDS = 2 * CROP_ATTEMPTS + 2
"""Random numbers of one crop: area and ratio of each attempt, then top and left."""


def exp_portable(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return exp(x) for |x| <= 2, with equal bits on every CPU.

    NumPy's exp differs by a unit in the last place between instruction sets; additions and multiplications do not. This is
    the Taylor polynomial of degree 25, with a remainder below 1e-18.
    """
    result = np.ones_like(exponents)
    for degree in range(25, 0, -1):
        result = 1.0 + result * exponents / degree
    return result


def draw_crops(
    uniforms: NDArray[np.float64], heights: NDArray[np.int32], widths: NDArray[np.int32], transform: TransformConfig
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Turn uniform numbers [..., B, CROP_WORDS] into crops: top, left, height, width, each [..., B], px.

    The area is uniform in `crop_scale`, width / height log-uniform in `crop_ratio`. The first of ten attempts that fits
    the image is used, or else the largest centre crop within the ratios.

    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    image_h, image_w = heights.astype(np.float64), widths.astype(np.float64)
    area_low, area_high = transform.crop_scale
    log_low, log_high = (math.log(bound) for bound in transform.crop_ratio)
    areas = (image_h * image_w)[:, None] * (area_low + (area_high - area_low) * uniforms[..., 0:CROP_ATTEMPTS])
    log_ratios = log_low + (log_high - log_low) * uniforms[..., CROP_ATTEMPTS : 2 * CROP_ATTEMPTS]
    ratios = exp_portable(log_ratios)
    crop_w = np.rint(np.sqrt(areas * ratios))
    crop_h = np.rint(np.sqrt(areas / ratios))
    fits = (crop_w > 0) & (crop_w <= image_w[:, None]) & (crop_h > 0) & (crop_h <= image_h[:, None])
    attempt = np.argmax(fits, axis=-1)[..., None]
    any_fits = fits.any(axis=-1)
    height = np.take_along_axis(crop_h, attempt, axis=-1)[..., 0]
    width = np.take_along_axis(crop_w, attempt, axis=-1)[..., 0]

    centre_h, centre_w = _centre_crop_size(image_h, image_w, transform.crop_ratio)
    height = np.where(any_fits, height, centre_h)
    width = np.where(any_fits, width, centre_w)
    room_h, room_w = image_h - height, image_w - width
    top = np.where(any_fits, np.floor(uniforms[..., 2 * CROP_ATTEMPTS] * (room_h + 1)), np.floor(room_h / 2))
    left = np.where(any_fits, np.floor(uniforms[..., 2 * CROP_ATTEMPTS + 1] * (room_w + 1)), np.floor(room_w / 2))
    return top.astype(np.int32), left.astype(np.int32), height.astype(np.int32), width.astype(np.int32)


def _centre_crop_size(
    image_h: NDArray[np.float64], image_w: NDArray[np.float64], crop_ratio: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ratio_low, ratio_high = crop_ratio
    ratio = image_w / image_h
    height = np.where(ratio < ratio_low, np.rint(image_w / ratio_low), image_h)
    width = np.where(ratio > ratio_high, np.rint(image_h * ratio_high), image_w)
    return np.maximum(height, 1.0), np.maximum(width, 1.0)


def crop_iou(
    top: NDArray[np.int32],
    left: NDArray[np.int32],
    height: NDArray[np.int32],
    width: NDArray[np.int32],
    pairs: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return the intersection over union of both crops of every pair, [B, P], in px of the original image.

    Args:
        top, left, height, width: [V, B].
        pairs: [P, 2], view indices.
    """
    first, second = pairs[:, 0], pairs[:, 1]
    bottom, right = top + height, left + width
    overlap_h = np.minimum(bottom[first], bottom[second]) - np.maximum(top[first], top[second])
    overlap_w = np.minimum(right[first], right[second]) - np.maximum(left[first], left[second])
    overlap = np.maximum(overlap_h, 0).astype(np.float64) * np.maximum(overlap_w, 0)
    areas = height.astype(np.float64) * width
    return (overlap / (areas[first] + areas[second] - overlap)).astype(np.float32).T
