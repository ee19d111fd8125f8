"""Photographs that benchmarks render, real or made up, and the chains of operations that they are rendered with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvp_ray.config import ViewGroupConfig
from hvp_ray.data.decode import read_size
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.views.plan import draw_plan
from tests.helpers import encode, photograph_like

MAX_IMAGE_PIXELS = 10**8
CHAINS = {
    "simsiam": "simsiam-imagenet-r50-100ep",
    "simclr": "simclr-imagenet-r50-100ep",
    "dino": "dino-imagenet-vits16-100ep",
}
"""Name of a chain of operations -> recipe that has it."""
VIEWS = {"simsiam": (4, 0), "simclr": (4, 0), "dino": (2, 8)}
"""Chain -> global and local views of each photograph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Photographs:
    """Encoded photographs with their sizes."""

    images: list[bytes]
    sizes: NDArray[np.int32]
    """[N, 2]: height and width, px."""

    def first(self, count: int) -> "Photographs":
        """Return `count` of them, the first ones again where there are fewer."""
        rows = np.arange(count) % len(self.images)
        return Photographs(images=[self.images[row] for row in rows], sizes=self.sizes[rows])

    def plan(self, group: ViewGroupConfig, num_views: int, *, epoch: int = 0, local: bool = False) -> ViewPlan:
        """Return a plan of all of them."""
        return draw_plan(
            seed=0,
            purpose=Purpose.LOCAL_VIEWS if local else Purpose.GLOBAL_VIEWS,
            epoch=epoch,
            sample_ids=np.arange(len(self.images)),
            image_sizes=(self.sizes[:, 0].copy(), self.sizes[:, 1].copy()),
            num_views=num_views,
            group=group,
        )


def load_photographs(path: Path | None, count: int) -> Photographs:
    """Return the first `count` photographs of a Parquet file in the Hugging Face image layout, or made-up ones."""
    if path is None:
        generator = np.random.default_rng(0)
        sizes = [(375 + 5 * (i % 7), 500 - 9 * (i % 5)) for i in range(count)]
        images = [encode(photograph_like(generator, h, w), "JPEG", quality=92) for h, w in sizes]
    else:
        batch = next(pq.ParquetFile(path).iter_batches(count, columns=["image"]))
        images = [row["bytes"] for row in batch["image"].to_pylist()]
    return Photographs(
        images=images,
        sizes=np.array([read_size(image, max_pixels=MAX_IMAGE_PIXELS) for image in images], np.int32),
    )


def as_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return the pixels losslessly encoded, so that every renderer starts from the same."""
    return encode(pixels, compress_level=1)
