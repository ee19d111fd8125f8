"""The plan: every random decision of augmentation, drawn as numbers before a pixel is rendered.

Each view uses a fixed block of `WORDS_PER_VIEW` random words. So switching one operation off changes no other decision, and
view v of image i in epoch e does not depend on the number of views. Masks have words of their own (`masks.py`).
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import TransformConfig, ViewGroupConfig
from hvp_ray.randomness import Purpose, draw_words, uniform_from_words
from hvp_ray.records import ViewPlan
from hvp_ray.views.geometry import CROP_WORDS, draw_crops

WORDS_PER_VIEW = 48
"""Random words reserved for each view; 36 are used, the rest is for further operations."""

_FLIP = CROP_WORDS
_JITTER = _FLIP + 1
_FACTORS = _JITTER + 1  # brightness, contrast, saturation, hue
_ORDER = _FACTORS + 4
_GRAYSCALE = _ORDER + 4
_BLUR = _GRAYSCALE + 1
_BLUR_SIGMA = _BLUR + 1
_SOLARIZE = _BLUR_SIGMA + 1


def draw_plan(
    *,
    seed: int,
    purpose: Purpose,
    epoch: int,
    sample_ids: NDArray[np.int64],
    image_sizes: tuple[NDArray[np.int32], NDArray[np.int32]],
    num_views: int,
    group: ViewGroupConfig,
    channels: int = 3,
) -> ViewPlan:
    """Draw the plan of `num_views` views of each image.

    Args:
        seed: the run's seed.
        purpose: the stream to draw from: GLOBAL_VIEWS or LOCAL_VIEWS, or their REPLACEMENT_ twins.
        epoch: epoch of the step.
        sample_ids: [B].
        image_sizes: heights [B] and widths [B] of the original images, in px.
        num_views: V.
        group: transforms of the views.
        channels: of the images; other than 3 have no saturation, hue and grey.
    """
    words = draw_words(
        seed=seed, purpose=purpose, sample_ids=sample_ids, epoch=epoch, num_words=num_views * WORDS_PER_VIEW
    )
    words_VBK = words.reshape(len(sample_ids), num_views, WORDS_PER_VIEW).transpose(1, 0, 2)
    if channels != 3:
        group = without_rgb_operations(group)
    if group.odd is None:
        return _plan_from_words(words_VBK, *image_sizes, group.even)
    parts = [_plan_from_words(words_VBK[v : v + 1], *image_sizes, group.transform_of(v)) for v in range(num_views)]
    return ViewPlan.of_views(parts)


def without_rgb_operations(group: ViewGroupConfig) -> ViewGroupConfig:
    """Return the transforms without the operations that need RGB. All other decisions stay as they are."""

    def of(transform: TransformConfig) -> TransformConfig:
        return dataclasses.replace(transform, saturation=0.0, hue_turns=0.0, grayscale_probability=0.0)

    return dataclasses.replace(group, even=of(group.even), odd=None if group.odd is None else of(group.odd))


def _plan_from_words(
    words_VBK: NDArray[np.uint64], heights: NDArray[np.int32], widths: NDArray[np.int32], transform: TransformConfig
) -> ViewPlan:
    uniforms = uniform_from_words(words_VBK)
    top, left, height, width = draw_crops(uniforms[..., :CROP_WORDS], heights, widths, transform)
    jitter = uniforms[..., _JITTER] < transform.jitter_probability
    brightness, contrast, saturation = (
        np.where(jitter, _factor(uniforms[..., _FACTORS + index], strength), 1.0).astype(np.float32)
        for index, strength in enumerate((transform.brightness, transform.contrast, transform.saturation))
    )
    hue = (2.0 * uniforms[..., _FACTORS + 3] - 1.0) * transform.hue_turns
    sigma_low, sigma_high = transform.blur_sigma_px
    sigma = sigma_low + (sigma_high - sigma_low) * uniforms[..., _BLUR_SIGMA]
    blur = uniforms[..., _BLUR] < transform.blur_probability
    return ViewPlan(
        top=top,
        left=left,
        height=height,
        width=width,
        flip=uniforms[..., _FLIP] < transform.flip_probability,
        jitter=jitter,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue_turns=np.where(jitter, hue, 0.0).astype(np.float32),
        jitter_order=np.argsort(words_VBK[..., _ORDER : _ORDER + 4], axis=-1, kind="stable").astype(np.uint8),
        grayscale=uniforms[..., _GRAYSCALE] < transform.grayscale_probability,
        blur_sigma_px=np.where(blur, sigma, 0.0).astype(np.float32),
        solarize=uniforms[..., _SOLARIZE] < transform.solarize_probability,
    )


def _factor(uniforms: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Map [0, 1) to the factor's range, from max(0, 1 - strength) to 1 + strength."""
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * uniforms
