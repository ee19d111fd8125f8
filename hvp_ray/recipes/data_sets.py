"""Data sets and view settings that recipes of several methods share. This file holds no recipe."""

import dataclasses
from typing import Literal

from hvp_ray.config import (
    DataConfig,
    MaskConfig,
    TrackingConfig,
    TransformConfig,
    ViewGroupConfig,
    ViewsConfig,
)

_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

DIGITS = DataConfig(source="digits")
CIFAR10 = DataConfig(source="cifar10-train.parquet")
IMAGENETTE = DataConfig(source="imagenette/train")
IMAGENET = DataConfig(source="imagenet/train")

CIFAR10_TRACKING = TrackingConfig(log_every_steps=10, knn_images=50_000, knn_neighbours=200)
IMAGENET_TRACKING = TrackingConfig(log_every_steps=10)


def digits_transform(crop_scale: tuple[float, float] = (0.6, 1.0)) -> TransformConfig:
    """Return a transform for scanned digits: no flips (a mirrored digit is another sign), no colour (they are grey)."""
    return TransformConfig(
        crop_scale=crop_scale,
        crop_ratio=(4 / 5, 5 / 4),
        flip_probability=0.0,
        jitter_probability=0.5,
        saturation=0.0,
        hue_turns=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
    )


def digits_views(
    global_views: ViewGroupConfig, local_views: ViewGroupConfig | None = None, masks: MaskConfig | None = None
) -> ViewsConfig:
    """Return views of scanned digits."""
    return ViewsConfig(
        global_views=global_views,
        local_views=local_views,
        masks=masks,
        mean=(0.3, 0.3, 0.3),
        std=(0.35, 0.35, 0.35),
        evaluation_resize_px=global_views.size_px,
    )


def cifar10_views(
    global_views: ViewGroupConfig, local_views: ViewGroupConfig | None = None, masks: MaskConfig | None = None
) -> ViewsConfig:
    """Return views of CIFAR-10."""
    return ViewsConfig(
        global_views=global_views,
        local_views=local_views,
        masks=masks,
        mean=_CIFAR_MEAN,
        std=_CIFAR_STD,
        evaluation_resize_px=global_views.size_px,
    )


def imagenette_views(global_views: ViewGroupConfig, local_views: ViewGroupConfig | None = None) -> ViewsConfig:
    """Return views of photographs at a small size; evaluation crops the centre."""
    return ViewsConfig(
        global_views=global_views,
        local_views=local_views,
        evaluation_resize_px=round(global_views.size_px * 8 / 7),
    )


def imagenet_views(
    global_views: ViewGroupConfig,
    local_views: ViewGroupConfig | None = None,
    masks: MaskConfig | None = None,
    *,
    evaluation_interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> ViewsConfig:
    """Return views of ImageNet at 224 px; evaluation resizes to 256."""
    return ViewsConfig(
        global_views=global_views,
        local_views=local_views,
        masks=masks,
        evaluation_resize_px=256,
        evaluation_interpolation=evaluation_interpolation,
    )


def dino_multi_crop(
    *,
    global_px: int,
    global_scale: tuple[float, float],
    local_px: int,
    local_scale: tuple[float, float],
    blur: bool = True,
) -> tuple[ViewGroupConfig, ViewGroupConfig]:
    """Return DINO's global views (even: blur 1.0; odd: blur 0.1, solarize 0.2) and local views (blur 0.5).

    Source: facebookresearch/dino main_dino.py, DataAugmentationDINO; automl/hvp, branch dino, data/__init__.py.
    """
    even = TransformConfig(
        crop_scale=global_scale,
        interpolation="bicubic",
        saturation=0.2,
        blur_probability=1.0 if blur else 0.0,
    )
    odd = dataclasses.replace(even, blur_probability=0.1 if blur else 0.0, solarize_probability=0.2)
    local = dataclasses.replace(even, crop_scale=local_scale, blur_probability=0.5 if blur else 0.0)
    return (
        ViewGroupConfig(size_px=global_px, even=even, odd=odd),
        ViewGroupConfig(size_px=local_px, even=local),
    )
