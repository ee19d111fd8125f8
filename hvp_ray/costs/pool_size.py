"""View workers, link and object store that a demand of images per second needs.

With d images per second of all trainers together, T trainers, and c CPU seconds of an image at a view worker
(`docs/sizing.md` derives and checks the formulas):

    view workers        1.2 d c
    view finishers      1.2 d f / T         beside each trainer, ship=pixels; f CPU seconds of rendering alone
    link                d b / T             bytes per second into the node of a trainer; b bytes shipped for an image
    batches in flight   workers / T + finishers + 2     each works on one batch at a time
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hvp_ray.config import RunConfig
from hvp_ray.costs.prefetch import batches_for_workers
from hvp_ray.costs.service_times import ServiceTimes
from hvp_ray.stream.pool_control import CAPACITY_FACTOR

USABLE_LINK_FRACTION = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSize:
    """Resources that a demand of images per second needs."""

    ship: Literal["views", "pixels"]
    num_view_workers: int
    finishers_per_trainer: int
    link_bytes_per_second: float
    """Traffic into the node of one trainer."""
    batches_in_flight: int
    store_bytes: float
    """Object store on the node of a trainer, for its prefetched batches and the batch in use."""


def size_pool(
    config: RunConfig, times: ServiceTimes, *, images_per_second: float, ship: Literal["views", "pixels"]
) -> PoolSize:
    """Return the resources that a demand needs.

    Args:
        config: the run.
        times: service times of the machine that renders.
        images_per_second: demand of all trainers together.
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
    cluster = dataclasses.replace(config.cluster, ship=ship, renderer="cpu", finishers_per_trainer=max(1, finishers))
    batches = batches_for_workers(cluster, workers)
    return PoolSize(
        ship=ship,
        num_view_workers=workers,
        finishers_per_trainer=finishers,
        link_bytes_per_second=images_per_second / trainers * shipped,
        batches_in_flight=batches,
        store_bytes=(batches + 1) * config.images_per_rank * stored,
    )


def recommend_ship(sizes: Sequence[PoolSize], link_bytes_per_second: float) -> Literal["views", "pixels"] | None:
    """Return what to ship over a link into each trainer's node: views if they fit, else pixels. None: neither fits."""
    usable = USABLE_LINK_FRACTION * link_bytes_per_second
    fitting = [size.ship for size in sizes if size.link_bytes_per_second <= usable]
    return next((ship for ship in ("views", "pixels") if ship in fitting), None)
