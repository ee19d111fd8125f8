"""Bytes in flight against the object store, and what the store really spilled."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]
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


def step_bytes(config: RunConfig, decoded_bytes: float = 0.0) -> int:
    """Return the bytes that one step of all trainers can take in the object store.

    Args:
        config: the run.
        decoded_bytes: of one image on average, where decoded pixels are shipped: they lie beside the views for a while.
    """
    shipped = decoded_bytes * config.images_per_rank if config.cluster.ship == "pixels" else 0.0
    return config.cluster.num_trainers * (batch_bytes(config) + int(shipped))


def look_ahead_bytes(config: RunConfig, decoded_bytes: float = 0.0) -> int:
    """Return the bytes that all trainers can have under way at once: the look-ahead and the batch in use."""
    return (config.cluster.num_batches_in_flight() + 1) * step_bytes(config, decoded_bytes)


def decide_look_ahead(
    config: RunConfig, num_view_workers: int, store_bytes: float, decoded_bytes: float = 0.0
) -> RunConfig:
    """Return the config with `cluster.batches_in_flight` as a number: enough for all view workers, if the store holds it.

    Raises:
        ConfigError: the look-ahead is more than 70 % of the object store, and was set; or not even one batch fits.
    """
    ahead = config.cluster.num_batches_in_flight(num_view_workers)
    if config.cluster.batches_in_flight == "auto":
        ahead = max(1, min(ahead, _num_that_fit(config, store_bytes, decoded_bytes)))
    decided = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, batches_in_flight=ahead))
    check_store(decided, store_bytes, decoded_bytes)
    return decided


def _num_that_fit(config: RunConfig, store_bytes: float, decoded_bytes: float) -> int:
    return int(USABLE_STORE_FRACTION * store_bytes // step_bytes(config, decoded_bytes)) - 1


def store_to_start(config: RunConfig, num_view_workers: int, decoded_bytes: float = 0.0) -> int:
    """Return the bytes of the object store of a Ray that is started for this run alone.

    Three times the look-ahead: it lies there twice where a batch is copied, and Ray spills at 0.8. For batches that were not
    asked for by number no more than 30 % of the machine's memory, which is what Ray takes by itself.
    """
    cluster = config.cluster
    if cluster.object_store_mib != "auto":
        return cluster.object_store_mib * 2**20
    needed = 3 * (cluster.num_batches_in_flight(num_view_workers) + 1) * step_bytes(config, decoded_bytes)
    if cluster.batches_in_flight == "auto":
        needed = min(needed, int(0.3 * psutil.virtual_memory().total))
    return max(2**28, needed)


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
    of_views = [s for s, node in zip(stores, alive, strict=True) if room_for(node, view_worker) >= 1]
    of_trainers = []
    for store, node in zip(stores, alive, strict=True):
        count = min(room_for(node, trainer), config.cluster.num_trainers)
        if count >= 1:
            of_trainers.append(store / count * config.cluster.num_trainers)
    # Nodes that are still to come are not looked at; where there is none yet, what is there has to do.
    return min([*of_trainers, sum(of_views) if of_views else sum(stores)])


def room_for(node: Mapping[str, float], needed: Mapping[str, float]) -> int:
    """Return how many processes of these needs a node can take."""
    return min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needed.items() if amount > 0.0), default=1)


def check_store(config: RunConfig, store_bytes: float, decoded_bytes: float = 0.0) -> None:
    """Refuse a look-ahead that would spill.

    Raises:
        ConfigError: the look-ahead is more than 70 % of the object store.
    """
    needed, ahead = look_ahead_bytes(config, decoded_bytes), config.cluster.num_batches_in_flight()
    if needed <= USABLE_STORE_FRACTION * store_bytes:
        return
    per_batch = step_bytes(config, decoded_bytes) / config.cluster.num_trainers
    fits = _num_that_fit(config, store_bytes, decoded_bytes)
    advice = f"set cluster.batches_in_flight={fits}" if fits >= 1 else "use fewer images per step or smaller views"
    raise ConfigError(
        f"the look-ahead needs {needed / 2**20:.0f} MiB of the object store (cluster.batches_in_flight="
        f"{ahead} batches and one in use, {per_batch / 2**20:.1f} MiB each, "
        f"{config.cluster.num_trainers} trainer(s)), but of its {store_bytes / 2**20:.0f} MiB only "
        f"{USABLE_STORE_FRACTION:.0%} can be used without spilling to disk; {advice}, or give Ray a larger "
        f"object store (cluster.object_store_mib for a local Ray, `ray start --object-store-memory` otherwise)"
    )


def spilled_bytes() -> int:
    """Return the bytes that all object stores of the cluster have spilled since they started."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)
