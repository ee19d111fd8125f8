"""How large a pool has to be: service times of this machine, measured, and what follows from them. Starts nothing.

The formulas, with d images per second of all trainers together, T trainers, and c CPU seconds that an image costs at a view
worker (docs/sizing.md says where they come from, and where they were checked):

    view workers        1.2 d c
    view finishers      1.2 d f / T         beside each trainer, ship=pixels; f CPU seconds of rendering alone
    link                d b / T             bytes per second into the node of a trainer; b bytes shipped for an image
    batches in flight   workers / T + finishers + 2     each works on one batch at a time
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import cv2
import numpy as np
import torch

from hvp_ray.config import DataConfig, RunConfig, ViewGroupConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.decode import decode_rgb, read_size
from hvp_ray.errors import UnreadableImageError
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.stream.capacity import batch_bytes
from hvp_ray.stream.reading import SAMPLE_IMAGES, read_sample
from hvp_ray.views.decoded import decode_used
from hvp_ray.views.plan import draw_plan
from hvp_ray.views.render_cpu import CpuRenderer

CAPACITY_FACTOR = 1.2
"""Rendering capacity / demand that leaves no waiting to speak of (benchmarks/stream.py)."""

USABLE_LINK_FRACTION = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceTimes:
    """What an image takes on average. CPU seconds of one thread of this machine, without reading from storage."""

    num_images: int
    """Images that were measured."""
    whole_seconds: float
    """Decoding and rendering all its views."""
    decode_seconds: float
    """Decoding, and cutting to what its views use."""
    finish_seconds: float
    """Rendering its views from that."""
    encoded_bytes: float
    shipped_pixel_bytes: float
    """Decoded pixels that its views use."""
    view_bytes: float
    """Pixels of its views."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What a demand takes."""

    ship: Literal["views", "pixels"]
    num_view_workers: int
    finishers_per_trainer: int
    link_bytes_per_second: float
    """Into the node of one trainer."""
    batches_in_flight: int
    store_bytes: float
    """Of the object store on the node of a trainer, for that trainer's look-ahead and the batch in use."""
    calls_per_second: float
    """Requests of all trainers to view workers."""


def sample_images(dataset: Dataset, num_images: int = SAMPLE_IMAGES) -> list[bytes]:
    """Return encoded images spread over those that are trained on; of sources that read whole blocks, a few runs of them.

    Raises:
        DataError: the storage failed repeatedly.
    """
    return list(read_sample(dataset.source, dataset.training_ids, num_images))


def mean_decoded_bytes(dataset: Dataset, data: DataConfig) -> float:
    """Return the mean bytes of decoded images, from the headers of a sample; images that cannot be read do not count.

    Raises:
        DataError: the storage failed repeatedly.
    """
    sizes = []
    for image in sample_images(dataset):
        try:
            height, width = read_size(image, max_pixels=data.max_image_pixels)
        except UnreadableImageError:
            continue
        sizes.append(height * width * 3)
    return float(np.mean(sizes)) if sizes else 0.0


def measure_service_times(config: RunConfig, images: Sequence[bytes], *, seconds: float = 1.0) -> ServiceTimes:
    """Render images as the run's view workers would, with renderer cpu, and in two halves.

    Args:
        config: the run.
        images: encoded; those that cannot be decoded are left out.
        seconds: CPU time that each of the three measurements takes at least.

    Raises:
        UnreadableImageError: none can be decoded.
    """
    limit, intensity_range, selection = config.data.max_image_pixels, config.data.intensity_range, config.selection
    readable, sizes = [], []
    reason = "there are no images"
    for image in images:
        try:
            sizes.append(decode_rgb(image, max_pixels=limit, intensity_range=intensity_range).shape[:2])
            readable.append(image)
        except UnreadableImageError as error:
            reason = str(error)
    if not readable:
        raise UnreadableImageError(reason)
    heights, widths = (np.array(edges, np.int32) for edges in zip(*sizes, strict=True))

    def plan(purpose: Purpose, num_views: int, group: ViewGroupConfig) -> ViewPlan:
        return draw_plan(
            seed=0,
            purpose=purpose,
            epoch=0,
            sample_ids=np.arange(len(readable)),
            heights=heights,
            widths=widths,
            num_views=num_views,
            group=group,
        )

    global_plan, local_plan = plan(Purpose.GLOBAL_VIEWS, selection.num_views_at(0), config.views.global_views), None
    if config.views.local_views is not None:
        local_plan = plan(Purpose.LOCAL_VIEWS, selection.num_local_views_at(0), config.views.local_views)
    renderer = CpuRenderer(config.views, max_image_pixels=limit, intensity_range=intensity_range)
    decode_images = partial(decode_used, max_image_pixels=limit, intensity_range=intensity_range)
    decoded = decode_images(readable, global_plan, local_plan)
    works: list[Callable[[], object]] = [
        lambda: renderer.render(readable, global_plan, local_plan),
        lambda: decode_images(readable, global_plan, local_plan),
        lambda: renderer.render_decoded(decoded, global_plan, local_plan),
    ]
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        whole, decode, finish = (_cpu_seconds(work, seconds) / len(readable) for work in works)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    return ServiceTimes(
        num_images=len(readable),
        whole_seconds=whole,
        decode_seconds=decode,
        finish_seconds=finish,
        encoded_bytes=sum(map(len, readable)) / len(readable),
        shipped_pixel_bytes=decoded.pixels.nbytes / len(readable),
        view_bytes=batch_bytes(config) / config.images_per_rank,
    )


def _cpu_seconds(work: Callable[[], object], at_least: float) -> float:
    """Return the CPU time of one call, the mean of as many as fill the time, after one to warm up."""
    work()
    begun, count = time.process_time(), 0
    while time.process_time() - begun < at_least:
        work()
        count += 1
    return (time.process_time() - begun) / count


def size_pool(
    config: RunConfig, times: ServiceTimes, *, images_per_second: float, ship: Literal["views", "pixels"]
) -> Need:
    """Return what so many images per second, of all trainers together, take.

    Args:
        config: the run.
        times: of the machine that renders.
        images_per_second: demand of all trainers.
        ship: `cluster.ship`.
    """
    trainers = config.cluster.num_trainers
    at_worker = times.whole_seconds if ship == "views" else times.decode_seconds
    workers = max(1, math.ceil(CAPACITY_FACTOR * images_per_second * at_worker - 1e-9))
    finishers, shipped, stored = 0, times.view_bytes, times.view_bytes
    if ship == "pixels":
        finishers = max(1, math.ceil(CAPACITY_FACTOR * images_per_second / trainers * times.finish_seconds - 1e-9))
        shipped = times.shipped_pixel_bytes
        stored += shipped
    cluster = dataclasses.replace(
        config.cluster, ship=ship, renderer="cpu", finishers_per_trainer=max(1, finishers), batches_in_flight="auto"
    )
    ahead = cluster.num_batches_in_flight(workers)
    return Need(
        ship=ship,
        num_view_workers=workers,
        finishers_per_trainer=finishers,
        link_bytes_per_second=images_per_second / trainers * shipped,
        batches_in_flight=ahead,
        store_bytes=(ahead + 1) * config.images_per_rank * stored,
        calls_per_second=images_per_second / config.images_per_rank,
    )


def recommend_ship(needs: Sequence[Need], link_bytes_per_second: float) -> Literal["views", "pixels"] | None:
    """Return what to ship over a link into each trainer's node: views if they fit, as the simplest; None: nothing fits."""
    fitting = [n.ship for n in needs if n.link_bytes_per_second <= USABLE_LINK_FRACTION * link_bytes_per_second]
    return "views" if "views" in fitting else (fitting[0] if fitting else None)
