"""Block masks of global views for masked image modelling: part of the plan, so drawn before rendering.

Each view uses a fixed block of `WORDS_PER_MASK` random words from a stream of its own, so masks change no other decision.
"""

import math

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import MaskConfig
from hvp_ray.randomness import Purpose, draw_words, uniform_from_words
from hvp_ray.views.geometry import exp_portable

ATTEMPTS_PER_BLOCK = 10
"""Attempts at placing one block; after as many failures in a row, the mask is complete."""

_WORDS_PER_ATTEMPT = 4
WORDS_PER_MASK = 2 + 96 * _WORDS_PER_ATTEMPT
"""Masked or not, the fraction masked, and 96 attempts at blocks. On a 14 x 14 grid a mask takes 6 on average and 40 at
most, in 20,000 masks."""


def draw_masks(
    *,
    seed: int,
    purpose: Purpose,
    epoch: int,
    sample_ids: NDArray[np.int64],
    num_views: int,
    size_px: int,
    masks: MaskConfig,
) -> NDArray[np.bool_]:
    """Draw the masks of `num_views` global views of each image, [V, B, rows, columns], True is masked.

    Args:
        seed: the run's seed.
        purpose: MASKS or REPLACEMENT_MASKS.
        epoch: epoch of the step.
        sample_ids: [B].
        num_views: V.
        size_px: height and width of a view.
        masks: their distribution.
    """
    words = draw_words(
        seed=seed, purpose=purpose, sample_ids=sample_ids, epoch=epoch, num_words=num_views * WORDS_PER_MASK
    )
    uniforms = uniform_from_words(words).reshape(len(sample_ids), num_views, WORDS_PER_MASK)
    grid = masks.grid(size_px)
    drawn = np.zeros((num_views, len(sample_ids), grid, grid), dtype=np.bool_)
    for image_index, of_image in enumerate(uniforms):
        for view_index, of_view in enumerate(of_image):
            drawn[view_index, image_index] = block_mask(of_view, grid, masks)
    return drawn


def block_mask(uniforms: NDArray[np.float64], grid: int, masks: MaskConfig) -> NDArray[np.bool_]:
    """Turn uniform numbers [WORDS_PER_MASK] into a mask, [grid, grid].

    Rectangles of random area and shape are added until the wanted fraction is reached. One that covers nothing new, or
    more than is wanted, is redrawn.

    Source: bytedance/ibot loader.py:54-116, after BEiT (Bao et al., ICLR 2022), algorithm 1; DINOv2's
    data/masking.py has other smallest blocks.
    """
    mask = np.zeros((grid, grid), dtype=np.bool_)
    if uniforms[0] < masks.unmasked_probability:
        return mask
    low, high = masks.ratio
    wanted = (low + (high - low) * uniforms[1]) * grid * grid
    smallest = (grid // 3) ** 2 if masks.min_block_patches is None else masks.min_block_patches
    log_low, log_high = (math.log(bound) for bound in masks.block_ratio)
    attempts = uniforms[2:].reshape(-1, _WORDS_PER_ATTEMPT)
    ratios = exp_portable(log_low + (log_high - log_low) * attempts[:, 1])
    masked, failures = 0, 0
    for (area_at, _, top_at, left_at), ratio in zip(attempts.tolist(), ratios.tolist(), strict=True):
        if masked >= wanted or failures == ATTEMPTS_PER_BLOCK:
            break
        area = smallest + (wanted - masked - smallest) * area_at
        height, width = (round(math.sqrt(max(0.0, area * shape))) for shape in (ratio, 1.0 / ratio))
        failures += 1
        if height >= grid or width >= grid:
            continue
        top, left = int(top_at * (grid - height + 1)), int(left_at * (grid - width + 1))
        block = mask[top : top + height, left : left + width]
        new = height * width - int(block.sum())
        if 0 < new <= wanted - masked:
            block[:] = True
            masked += new
            failures = 0
    return mask
