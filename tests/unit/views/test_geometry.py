"""Crops against torchvision's RandomResizedCrop, overlap against counted pixels."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from hvp_ray.config import TransformConfig
from hvp_ray.selection.candidates import pair_table
from hvp_ray.views.geometry import CROP_WORDS, crop_iou, draw_crops, exp_portable


def _crops(generator: np.random.Generator, count: int, height: int, width: int, transform: TransformConfig) -> tuple:
    uniforms = generator.random((count, CROP_WORDS))
    return draw_crops(uniforms, np.full(count, height, np.int32), np.full(count, width, np.int32), transform)


def test_exp_portable_equals_exp() -> None:
    x = np.linspace(-2, 2, 4001)
    assert np.abs(exp_portable(x) / np.exp(x) - 1).max() < 1e-14


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (1, 1), (1, 300), (600, 20), (2, 3)])
def test_crops_lie_inside_the_image(generator: np.random.Generator, height: int, width: int) -> None:
    top, left, h, w = _crops(generator, 2000, height, width, TransformConfig(crop_scale=(0.08, 1.0)))
    assert top.min() >= 0
    assert left.min() >= 0
    assert h.min() >= 1
    assert w.min() >= 1
    assert (top + h).max() <= height
    assert (left + w).max() <= width


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 120)])
def test_crops_have_the_distribution_of_torchvision(generator: np.random.Generator, height: int, width: int) -> None:
    count = 20_000
    ours = np.stack(_crops(generator, count, height, width, TransformConfig()), axis=1)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        grid = np.union1d(a, b)
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / count
        assert distance < 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov at 0.1 %


def test_extreme_image_falls_back_to_the_centre(generator: np.random.Generator) -> None:
    top, left, h, w = _crops(generator, 50, 10, 1000, TransformConfig(crop_scale=(0.9, 1.0)))
    assert set(h.tolist()) == {10}
    assert set(w.tolist()) == {13}  # 10 x 4/3
    assert set(left.tolist()) == {493}
    assert set(top.tolist()) == {0}


def test_iou_equals_counted_pixels(generator: np.random.Generator) -> None:
    plan = [array.reshape(4, 10) for array in _crops(generator, 40, 30, 40, TransformConfig())]
    pairs = pair_table(4)
    ious = crop_iou(*plan, pairs)
    for image in range(10):
        masks = []
        for view in range(4):
            top, left, h, w = (int(edge[view, image]) for edge in plan)
            mask = np.zeros((30, 40), bool)
            mask[top : top + h, left : left + w] = True
            masks.append(mask)
        for row, (m, n) in enumerate(pairs.tolist()):
            expected = (masks[m] & masks[n]).sum() / (masks[m] | masks[n]).sum()
            assert ious[image, row] == pytest.approx(expected, abs=1e-6)


def test_random_pairs_overlap_as_in_the_reference(generator: np.random.Generator) -> None:
    """Mean IoU 0.474 and mean of the smallest of six 0.285 on 500 x 375, scale 0.2 to 1 (reference analysis)."""
    plan = [array.reshape(4, 20_000) for array in _crops(generator, 80_000, 375, 500, TransformConfig())]
    ious = crop_iou(*plan, pair_table(4))
    assert ious.mean() == pytest.approx(0.474, abs=0.004)
    assert ious.min(axis=1).mean() == pytest.approx(0.285, abs=0.004)
