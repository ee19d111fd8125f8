"""Pixels of renderers against each other and against torchvision, in uint8 levels: what is compared, and how."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.results_file import Result, Results
from hvp_ray.config import ViewGroupConfig
from hvp_ray.records import ViewPlan
from tests.torchvision_views import torchvision_view

_ONLY_JITTER = {"jitter_probability": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue_turns": 0.0}
OPERATIONS: dict[str, dict[str, object]] = {
    "crop and resize, bilinear": {},
    "crop and resize, bicubic": {"interpolation": "bicubic"},
    "flip": {"flip_probability": 1.0},
    "brightness": _ONLY_JITTER | {"brightness": 0.4},
    "contrast": _ONLY_JITTER | {"contrast": 0.4},
    "saturation": _ONLY_JITTER | {"saturation": 0.4},
    "hue": _ONLY_JITTER | {"hue_turns": 0.1},
    "grey": {"grayscale_probability": 1.0},
    "blur, 9 px": {"blur_probability": 1.0},
    "blur, 23 px": {"blur_probability": 1.0, "blur_kernel_px": 23},
    "solarize": {"solarize_probability": 1.0},
}
Pixels = NDArray[np.uint8]


def views_by_torchvision(decoded: list[Pixels], plan: ViewPlan, group: ViewGroupConfig) -> Pixels:
    """Return the views of decoded images [H, W, 3] by torchvision, the oracle, [V, B, S, S, 3]."""
    return np.stack(
        [
            np.stack([torchvision_view(image, plan, v, b, group).permute(1, 2, 0) for b, image in enumerate(decoded)])
            for v in range(plan.num_views)
        ]
    )


def statistics_of(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> dict[str, tuple[float, str]]:
    """Return mean and worst difference, and the share of values that differ by more than 8 levels, with units."""
    difference = np.concatenate([np.abs(a.astype(np.int16) - b).reshape(-1) for a, b in zip(ours, theirs, strict=True)])
    return {
        "mean": (float(difference.mean()), "levels"),
        "worst": (float(difference.max()), "levels"),
        "above_8": (100 * float((difference > 8).mean()), "%"),
    }


def differences(name: str, against: str, ours: list[Pixels], theirs: list[Pixels]) -> Results:
    """Yield these as results."""
    for quantity, (value, unit) in statistics_of(ours, theirs).items():
        result: Result = {"name": f"parity.{name}.{against}.{quantity}", "value": value, "unit": unit}
        yield result
