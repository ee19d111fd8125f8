"""Service times: the CPU time and bytes that one image costs at a view worker and at a view finisher, measured here."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch

from hvp_ray.config import RunConfig
from hvp_ray.costs.prefetch import batch_bytes
from hvp_ray.costs.step_plans import draw_step_plans
from hvp_ray.data.decode import decode_pixels
from hvp_ray.errors import UnreadableImageError
from hvp_ray.views.decoded import decode_used
from hvp_ray.views.render_cpu import CpuRenderer


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceTimes:
    """Means over images. CPU seconds of one thread of this machine, without reading from storage."""

    num_images: int
    """Images that were measured."""
    whole_seconds: float
    """Decoding an image and rendering all its views."""
    decode_seconds: float
    """Decoding, and cutting to the pixels that its views use."""
    finish_seconds: float
    """Rendering its views from these pixels."""
    encoded_bytes: float
    shipped_pixel_bytes: float
    """Decoded pixels that its views use."""
    view_bytes: float
    """Pixels of its views."""


def measure_service_times(config: RunConfig, images: Sequence[bytes], *, seconds: float = 1.0) -> ServiceTimes:
    """Render images as view workers do with renderer cpu, at once and in two stages.

    Args:
        config: the run.
        images: encoded. Images that cannot be decoded are left out.
        seconds: CPU time that each of the three measurements takes at least.

    Raises:
        UnreadableImageError: no image can be decoded.
    """
    data = config.data
    readable, sizes = [], []
    reason = "there are no images"
    for image in images:
        try:
            pixels = decode_pixels(image, data)
        except UnreadableImageError as error:
            reason = str(error)
            continue
        readable.append(image)
        sizes.append(pixels.shape[:2])
    if not readable:
        raise UnreadableImageError(reason)
    heights, widths = (np.array(edges, np.int32) for edges in zip(*sizes, strict=True))
    plans = draw_step_plans(config, heights, widths)
    renderer = CpuRenderer(config.views, data)
    decode = partial(decode_used, data=data)
    decoded = decode(readable, *plans)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        whole_seconds, decode_seconds, finish_seconds = (
            _cpu_seconds(work, seconds) / len(readable)
            for work in (
                partial(renderer.render, readable, *plans),
                partial(decode, readable, *plans),
                partial(renderer.render_decoded, decoded, *plans),
            )
        )
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    return ServiceTimes(
        num_images=len(readable),
        whole_seconds=whole_seconds,
        decode_seconds=decode_seconds,
        finish_seconds=finish_seconds,
        encoded_bytes=sum(map(len, readable)) / len(readable),
        shipped_pixel_bytes=decoded.pixels.nbytes / len(readable),
        view_bytes=batch_bytes(config) / config.images_per_rank,
    )


def _cpu_seconds(work: Callable[[], object], at_least: float) -> float:
    """Return the mean CPU time of a call. The first call warms up and is not measured."""
    work()
    begun, count = time.process_time(), 0
    while time.process_time() - begun < at_least:
        work()
        count += 1
    return (time.process_time() - begun) / count
