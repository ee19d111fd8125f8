"""kornia and torchvision v2 on a GPU, doing the chains of our recipes with random parameters of their own.

kornia works on batches of one size: the photographs are scaled to 256 px for it beforehand, so it crops from fewer pixels
than ours, which crops from photographs as they are. torchvision draws parameters once for each call, so it is called for
each view of each photograph.
"""

from collections.abc import Callable

import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F

from hvp_ray.config import TransformConfig, ViewGroupConfig

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
    """Return the operations of a view as torchvision's, on a uint8 tensor [3, H, W]."""
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


def kornia_views(images: torch.Tensor, group: ViewGroupConfig, view_index: int) -> Views:
    """Return what renders one view of `images` [B, 3, H, W] (float, 0 to 1) and leaves bytes on the device."""
    chain = kornia_chain(group.transform_of(view_index), group.size_px).to(images.device)
    return lambda: (chain(images) * 255).to(torch.uint8)


def torchvision_views(images: list[torch.Tensor], group: ViewGroupConfig, view_index: int) -> Views:
    """Return what renders one view of each of `images` [3, H, W] (uint8) on their device."""
    chain = torchvision_chain(group.transform_of(view_index), group.size_px)
    return lambda: torch.stack([chain(image) for image in images])
