"""The plan rendered by torchvision: an oracle for renderers."""

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray

from hvp_ray.config import ViewGroupConfig
from hvp_ray.records import ViewPlan


def channels_first(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def torchvision_view(image: NDArray[np.uint8], plan: ViewPlan, v: int, b: int, group: ViewGroupConfig) -> torch.Tensor:
    """View v of image b by torchvision on float tensors, rounded once; blur on uint8 as there. [3, S, S], uint8."""
    transform, p = group.transform_of(v), plan.view(v, b)
    size = [group.size_px, group.size_px]
    mode = F.InterpolationMode(transform.interpolation)
    box = (p["top"], p["left"], p["height"], p["width"])
    view = F.resized_crop(channels_first(image), *box, size, interpolation=mode, antialias=True).float() / 255
    for operation in p["jitter_order"] if p["jitter"] else []:
        match operation:
            case 0:
                view = F.adjust_brightness(view, p["brightness"])
            case 1:
                view = F.adjust_contrast(view, p["contrast"])
            case 2:
                view = F.adjust_saturation(view, p["saturation"])
            case 3:
                view = F.adjust_hue(view, p["hue_turns"])
    if p["grayscale"]:
        view = F.rgb_to_grayscale(view, 3)
    view = (view * 255).round().to(torch.uint8)
    if p["blur_sigma_px"] > 0:
        kernel = [transform.blur_kernel_px] * 2
        view = F.gaussian_blur(view, kernel, [p["blur_sigma_px"]] * 2)
    if p["solarize"]:
        view = F.solarize(view, 128)
    return F.horizontal_flip(view) if p["flip"] else view
