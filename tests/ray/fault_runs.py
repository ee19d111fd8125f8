"""Make the run that the tests of faults disturb, and its images."""

import dataclasses
from pathlib import Path

import numpy as np

from hvp_ray.config import RunConfig
from hvp_ray.recipes import get_recipe
from tests.helpers import encode, photograph_like, tiny_config

NUM_IMAGES, NUM_DAMAGED = 400, 20
"""5 % are damaged."""
IMAGES_PER_STEP = 64
NUM_STEPS = 24
"""Four epochs."""

POISONED_ID = 60
POISON = b"poison"
"""A JPEG with this end crashes the decoder of `dying_decoder`."""


def fault_config(output: Path, name: str, images: Path, **cluster: object) -> RunConfig:
    """Return a run with batches of 200 kB, which go through the object store; Ray inlines results below 100 kB."""
    views = get_recipe("simsiam-digits").views
    large = dataclasses.replace(views.global_views, size_px=16)
    return tiny_config(
        str(output),
        run={"name": name},
        data={"source": str(images), "num_images": None, "test_fraction": 0.0, "max_unreadable_fraction": 0.1},
        views={"global_views": large, "evaluation_resize_px": 16},
        training={"num_steps": NUM_STEPS, "images_per_step": IMAGES_PER_STEP},
        cluster={"stall_seconds": 600.0} | cluster,
    )


def write_images(folder: Path, *, is_poisoned: bool) -> None:
    """Write JPEGs of which 5 % are damaged; one more crashes the decoder, or is damaged too."""
    generator = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for index in range(NUM_IMAGES):
        image = encode(photograph_like(generator, 24, 30), "JPEG")
        if index % (NUM_IMAGES // NUM_DAMAGED) == 7:
            image = image[: len(image) // 2]
        if index == POISONED_ID:
            image = image + POISON if is_poisoned else b"damaged"
        (folder / "class" / f"{index:03d}.jpg").write_bytes(image)
