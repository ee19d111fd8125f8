"""Images on which a written encoder is compared with that of the run."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.errors import HvpRayError, first_line
from hvp_ray.evaluation.features import load_some_pixels

NUM_IMAGES = 8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ComparisonImages:
    """A few images as the run evaluates them."""

    pixels: NDArray[np.uint8]
    """[N, S, S, C]."""
    are_real: bool
    """Whether they come from the data of the run; otherwise they are noise."""
    description: str
    """What they are, for people."""


def load_comparison_images(config: RunConfig) -> ComparisonImages:
    """Return centre crops of some test images of the run, or noise if its data cannot be read any more."""
    try:
        pixels = load_some_pixels(open_dataset(config.data), config.views, config.data, count=NUM_IMAGES)
        why = "none of them can be decoded"
    except (HvpRayError, OSError) as error:
        pixels, why = np.empty(0, np.uint8), first_line(error)
    if len(pixels):
        return ComparisonImages(pixels=pixels, are_real=True, description=f"{len(pixels)} images of the run's data")
    size_px = config.views.global_views.size_px
    noise = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, size_px, size_px, len(config.views.mean)), np.uint8)
    return ComparisonImages(
        pixels=noise,
        are_real=False,
        description=f"{NUM_IMAGES} random images, because the run's data cannot be read ({why})",
    )
