"""kornia, torchvision and albumentations, doing the chains of our recipes with random parameters of their own.

kornia works on batches of one size: the photographs are scaled to 256 px for it beforehand, so it crops from fewer pixels
than ours, which crops from photographs as they are. The others draw parameters once for each call, so they are called for
each view of each photograph, which is decoded once: that is what the authors' loader does (torchvision's ImageFolder opens
an image with PIL, and MultiCropsTransform calls the transform once for each view; automl/hvp data/__init__.py).
"""

import os
from collections.abc import Callable

import cv2
import numpy as np
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray

from hvp_ray.config import TransformConfig, ViewGroupConfig

Pixels = NDArray[np.uint8]
Views = Callable[[], torch.Tensor]
"""Render one view of all photographs, [B, 3, S, S]."""


def kornia_chain(transform: TransformConfig, size_px: int) -> torch.nn.Module:
    """Return the operations of a view as kornia's, on float tensors [B, 3, H, W] in 0 to 1."""
    import kornia.augmentation as K

    jitter = (transform.brightness, transform.contrast, transform.saturation, transform.hue_turns)
    operations = [
        K.RandomResizedCrop((size_px, size_px), scale=transform.crop_scale, ratio=transform.crop_ratio),
        K.RandomHorizontalFlip(p=transform.flip_probability),
        K.ColorJitter(*jitter, p=transform.jitter_probability),
        K.RandomGrayscale(p=transform.grayscale_probability),
        K.RandomGaussianBlur((transform.blur_kernel_px,) * 2, transform.blur_sigma_px, p=transform.blur_probability),
    ]
    if transform.solarize_probability > 0.0:
        operations.append(K.RandomSolarize(0.0, 0.0, p=transform.solarize_probability))
    return torch.nn.Sequential(*operations)


def torchvision_chain(transform: TransformConfig, size_px: int) -> T.Compose:
    """Return the operations of a view as torchvision's, on a uint8 tensor [3, H, W], or on an image of PIL."""
    jitter = T.ColorJitter(transform.brightness, transform.contrast, transform.saturation, transform.hue_turns)
    blur = T.GaussianBlur(transform.blur_kernel_px, transform.blur_sigma_px)
    operations = [
        T.RandomResizedCrop(
            size_px,
            scale=transform.crop_scale,
            ratio=transform.crop_ratio,
            interpolation=F.InterpolationMode(transform.interpolation),
            antialias=True,
        ),
        T.RandomHorizontalFlip(transform.flip_probability),
        T.RandomApply([jitter], transform.jitter_probability),
        T.RandomGrayscale(transform.grayscale_probability),
        T.RandomApply([blur], transform.blur_probability),
    ]
    if transform.solarize_probability > 0.0:
        operations.append(T.RandomSolarize(128, transform.solarize_probability))
    return T.Compose(operations)


def albumentations_chain(transform: TransformConfig, size_px: int, *, seed: int) -> Callable[..., dict[str, Pixels]]:
    """Return the operations of a view as albumentations', on uint8 pixels [H, W, 3], called with image=pixels.

    Resampling is by area: its other filters are not antialiased.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version
    import albumentations as A

    factors = (transform.brightness, transform.contrast, transform.saturation)
    hue = transform.hue_turns
    sigma_px, kernel_px = transform.blur_sigma_px, transform.blur_kernel_px
    operations = [
        A.RandomResizedCrop(
            (size_px, size_px), transform.crop_scale, transform.crop_ratio, interpolation=cv2.INTER_AREA
        ),
        A.HorizontalFlip(p=transform.flip_probability),
        A.ColorJitter(
            *((max(0.0, 1.0 - factor), 1.0 + factor) for factor in factors),
            hue=(-hue, hue),
            p=transform.jitter_probability,
        ),
        A.ToGray(p=transform.grayscale_probability),
        A.GaussianBlur(blur_limit=(kernel_px, kernel_px), sigma_limit=sigma_px, p=transform.blur_probability),
    ]
    if transform.solarize_probability > 0.0:
        operations.append(A.Solarize(p=transform.solarize_probability))
    return A.Compose(operations, seed=seed)


def kornia_views(images: torch.Tensor, group: ViewGroupConfig, view_index: int) -> Views:
    """Return what renders one view of `images` [B, 3, H, W] (float, 0 to 1) and leaves bytes on the device."""
    chain = kornia_chain(group.transform_of(view_index), group.size_px).to(images.device)
    return lambda: (chain(images) * 255).to(torch.uint8)


def torchvision_views(images: list[torch.Tensor], group: ViewGroupConfig, view_index: int) -> Views:
    """Return what renders one view of each of `images` [3, H, W] (uint8) on their device."""
    chain = torchvision_chain(group.transform_of(view_index), group.size_px)
    return lambda: torch.stack([chain(image) for image in images])
