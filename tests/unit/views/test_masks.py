"""Masks: share and shape as the reference draws them, bound to (seed, sample, epoch, view), replayable by hand."""

import numpy as np
import pytest

from hvp_ray.config import MaskConfig
from hvp_ray.errors import ConfigError
from hvp_ray.randomness import Purpose
from hvp_ray.views.masks import WORDS_PER_MASK, block_mask, draw_masks

IBOT = MaskConfig(patch_px=16)


def _draw(num_views: int = 4, num_images: int = 200, masks: MaskConfig = IBOT, seed: int = 0, **options: object):
    arguments = {
        "seed": seed,
        "purpose": Purpose.MASKS,
        "epoch": 0,
        "sample_ids": np.arange(num_images),
        "num_views": num_views,
        "size_px": 224,
        "masks": masks,
    }
    return draw_masks(**(arguments | options))


def test_half_of_the_views_are_unmasked_and_the_others_have_their_share() -> None:
    drawn = _draw()
    assert drawn.shape == (4, 200, 14, 14)
    shares = drawn.mean(axis=(2, 3)).ravel()
    unmasked = shares == 0.0
    assert 0.45 < unmasked.mean() < 0.55
    masked = shares[~unmasked]
    assert masked.max() <= 0.5
    assert IBOT.max_cells(224) == 98
    assert (drawn.sum(axis=(2, 3)) <= 98).all()
    # Wanted is uniform in 0.1 to 0.5; blocks that do not fit leave a little less.
    assert 0.24 < masked.mean() < 0.31
    assert masked.min() < 0.16
    assert masked.max() > 0.46


def test_masks_are_blocks_not_noise() -> None:
    """Most masked cells have a masked neighbour on the right: 0.3 of them would by chance."""
    drawn = _draw()
    has_neighbour = (drawn[..., :-1] & drawn[..., 1:]).sum() / drawn[..., :-1].sum()
    assert has_neighbour > 0.7


def test_mask_of_a_view_depends_on_its_address_only() -> None:
    two, four = _draw(num_views=2), _draw(num_views=4)
    assert np.array_equal(two, four[:2])
    assert np.array_equal(_draw(sample_ids=np.array([7, 3])), four[:, [7, 3]])
    for other in (_draw(seed=1), _draw(epoch=1), _draw(purpose=Purpose.REPLACEMENT_MASKS)):
        assert not np.array_equal(other, four)


def test_hand_computed_mask() -> None:
    """6 x 6 cells, share 0.5: 18 wanted.

    First block: area 4 + 14 x 0.5 = 11, square, so 3 x 3, at row 1, column 2; 9 are left. Second: area 9, ratio 3.3, so
    5 x 2, at row 1, column 4; three of its cells are masked already, 2 are left. The third (3 x 1 at row 3, column 5) lies
    within the second and is drawn again in vain, ten times.
    """
    uniforms = np.full(WORDS_PER_MASK, 0.999)
    uniforms[:2] = 0.6, 0.999999
    uniforms[2:6] = 0.5, 0.5, 0.3, 0.6  # area, ratio exp(0) = 1, top int(0.3 x 4), left int(0.6 x 4)
    expected = np.zeros((6, 6), np.bool_)
    expected[1:4, 2:5] = True
    expected[1:6, 4:6] = True
    mask = block_mask(uniforms, 6, MaskConfig(patch_px=1, ratio=(0.0, 0.5)))
    assert np.array_equal(mask, expected)
    uniforms[0] = 0.4
    assert not block_mask(uniforms, 6, MaskConfig(patch_px=1)).any()


def test_probability_one_never_masks_and_wrong_settings_are_refused() -> None:
    assert not _draw(masks=MaskConfig(patch_px=16, unmasked_probability=1.0)).any()
    with pytest.raises(ConfigError, match="views.masks.ratio"):
        MaskConfig(patch_px=16, ratio=(0.5, 0.1))
    with pytest.raises(ConfigError, match="views.masks.patch_px"):
        MaskConfig(patch_px=0)
