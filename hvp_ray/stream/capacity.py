"""Bytes in flight against the object store, and what the store really spilled."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from hvp_ray.config import RunConfig
from hvp_ray.errors import ConfigError

USABLE_STORE_FRACTION = 0.7
"""Ray begins to spill at 0.8 of the store."""


def batch_bytes(config: RunConfig) -> int:
    """Return the bytes of pixels of one rank's largest batch."""
    selection, views = config.selection, config.views
    pixels = selection.num_views_at(0) * views.global_views.size_px**2
    if views.local_views is not None:
        pixels += selection.num_local_views_at(0) * views.local_views.size_px**2
    return pixels * config.images_per_rank * 3


def look_ahead_bytes(config: RunConfig) -> int:
    """Return the bytes that all trainers can have under way at once: the look-ahead and the batch in use."""
    return config.cluster.num_trainers * (config.cluster.batches_in_flight + 1) * batch_bytes(config)


def store_for_look_ahead(
    config: RunConfig,
    nodes: Sequence[Mapping[str, Any]],
    trainer: Mapping[str, float],
    view_worker: Mapping[str, float],
) -> float:
    """Return the bytes of object store that the look-ahead of all trainers can use.

    A batch lies on the node that rendered it, and a copy of it on the node of its trainer. So the nodes of view workers
    have to hold it together, and a node of trainers that of as many trainers as may be there.

    Args:
        config: the run.
        nodes: `ray.nodes()`.
        trainer: resource -> amount that one trainer reserves.
        view_worker: the same of a view worker.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    stores = [resources.get("object_store_memory", 0.0) for resources in alive]
    of_views = [s for s, node in zip(stores, alive, strict=True) if _room(node, view_worker) >= 1]
    of_trainers = []
    for store, node in zip(stores, alive, strict=True):
        count = min(_room(node, trainer), config.cluster.num_trainers)
        if count >= 1:
            of_trainers.append(store / count * config.cluster.num_trainers)
    # Nodes that are still to come are not looked at; where there is none yet, what is there has to do.
    return min([*of_trainers, sum(of_views) if of_views else sum(stores)])


def _room(node: Mapping[str, float], needed: Mapping[str, float]) -> int:
    """Return how many processes of these needs a node can take."""
    return min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needed.items() if amount > 0.0), default=1)


def check_store(config: RunConfig, store_bytes: float) -> None:
    """Refuse a look-ahead that would spill.

    Raises:
        ConfigError: the look-ahead is more than 70 % of the object store.
    """
    needed = look_ahead_bytes(config)
    if needed <= USABLE_STORE_FRACTION * store_bytes:
        return
    per_batch = config.cluster.num_trainers * batch_bytes(config)
    fits = int(USABLE_STORE_FRACTION * store_bytes // per_batch) - 1
    advice = f"set cluster.batches_in_flight={fits}" if fits >= 1 else "use fewer images per step or smaller views"
    raise ConfigError(
        f"the look-ahead needs {needed / 2**20:.0f} MiB of the object store (cluster.batches_in_flight="
        f"{config.cluster.batches_in_flight} batches and one in use, {batch_bytes(config) / 2**20:.1f} MiB each, "
        f"{config.cluster.num_trainers} trainer(s)), but of its {store_bytes / 2**20:.0f} MiB only "
        f"{USABLE_STORE_FRACTION:.0%} can be used without spilling to disk; {advice}, or give Ray a larger "
        f"object store (cluster.object_store_mib for a local Ray, `ray start --object-store-memory` otherwise)"
    )


def spilled_bytes() -> int:
    """Return the bytes that all object stores of the cluster have spilled since they started."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)
