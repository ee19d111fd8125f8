"""Prefetched batches: how many keep the view workers busy, and the bytes of object store that they take."""

import math

import numpy as np

from hvp_ray.config import ClusterConfig, DataConfig, RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.decode import read_size
from hvp_ray.errors import UnreadableImageError
from hvp_ray.selection import hard_step
from hvp_ray.stream.reading import read_sample

USABLE_STORE_FRACTION = 0.7
"""Ray starts to spill at 0.8 of the object store."""


def batch_bytes(config: RunConfig) -> int:
    """Return the bytes of pixels of one rank's largest batch."""
    selection, views = config.selection, config.views
    of_step = hard_step(selection)
    pixels = of_step.num_views * views.global_views.size_px**2
    if views.local_views is not None:
        pixels += of_step.num_local_views * views.local_views.size_px**2
    probed = of_step.num_probe_images * selection.num_candidate_views
    return (pixels * config.images_per_rank + probed * views.global_views.size_px**2) * config.data.channels


def step_bytes(config: RunConfig, dataset: Dataset) -> int:
    """Return the bytes of object store that one step of all trainers takes.

    If decoded pixels are shipped, they stay in the store until their views are rendered.

    Args:
        config: the run.
        dataset: its data, of which a sample is read if decoded pixels are shipped.

    Raises:
        DataError: the storage failed repeatedly.
    """
    num_bytes = batch_bytes(config)
    if config.cluster.ship == "pixels":
        num_images = config.images_per_rank + hard_step(config.selection).num_probe_images
        num_bytes += int(_mean_decoded_bytes(config.data, dataset) * num_images)
    return config.cluster.num_trainers * num_bytes


def _mean_decoded_bytes(data: DataConfig, dataset: Dataset) -> float:
    """Return the mean bytes of a decoded image, from the headers of a sample."""
    sizes = []
    for image in read_sample(dataset.source, dataset.training_ids):
        try:
            height, width = read_size(image, max_pixels=data.max_image_pixels, channels=data.channels)
        except UnreadableImageError:
            continue
        sizes.append(height * width * data.channels)
    return float(np.mean(sizes)) if sizes else 0.0


def batches_for_workers(cluster: ClusterConfig, num_view_workers: int) -> int:
    """Return how many batches a trainer prefetches to keep its view workers and finishers busy.

    Each of them works on one batch. Two more cover the time in which the trainer takes a batch.
    """
    return max(4, math.ceil(num_view_workers / cluster.num_trainers) + cluster.num_finishers + 2)


def prefetch_bytes(batches_in_flight: int, bytes_per_step: int) -> int:
    """Return the bytes of all prefetched batches and of the batch in use."""
    return (batches_in_flight + 1) * bytes_per_step


def batches_that_fit(store_bytes: float, bytes_per_step: int) -> int:
    """Return how many batches fit an object store beside the batch in use, without spilling."""
    return int(USABLE_STORE_FRACTION * store_bytes // bytes_per_step) - 1
