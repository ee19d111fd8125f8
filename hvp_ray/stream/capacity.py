"""Bytes in flight against the object store, and what the store really spilled."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
from ray._common.utils import get_system_memory
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS, REQUIRE_SHM_SIZE_THRESHOLD
from ray._private.utils import estimate_available_memory, get_num_cpus, get_shared_memory_bytes
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

from hvp_ray.config import RunConfig
from hvp_ray.errors import ConfigError, StageError, first_line
from hvp_ray.stream.connect import LocalRay

MAX_AUTO_WORKERS = 64

USABLE_STORE_FRACTION = 0.7
"""Ray begins to spill at 0.8 of the store."""

PROCESS_BYTES = 400 * 2**20
"""Memory that a trainer or view worker shares with nobody; measured: 415 MiB for a view worker of simsiam-digits."""

_LEAST_STORE_BYTES = 80 * 2**20
_ANSWER_SECONDS = 60.0
_SHARE_OF_MEMORY_FOR_STORE = 0.3
"""What Ray takes by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What this machine, or the container around this process, can give."""

    num_cpus: int
    memory_bytes: int
    free_bytes: int
    """Memory that nobody uses."""
    shared_memory_bytes: int
    """Free space of /dev/shm."""


def this_machine() -> Machine:
    """Return what the operating system and the container's limits say now."""
    return Machine(
        num_cpus=max(1, int(get_num_cpus(override_docker_cpu_warning=True))),
        memory_bytes=get_system_memory(),
        free_bytes=estimate_available_memory(),
        shared_memory_bytes=get_shared_memory_bytes(),
    )


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


def plan_local_ray(config: RunConfig, machine: Machine, decoded_bytes: float = 0.0) -> LocalRay:
    """Return the size of a Ray that is started on this machine for this run alone.

    Ray hands out as many CPUs as the run reserves, which may be more than there are: processes then take turns. The object
    store has three times the prefetched batches, because a batch lies there twice while it is copied, and Ray spills at 0.8.
    With `batches_in_flight=auto` it takes at most 30 % of the memory.

    Raises:
        ConfigError: processes and object store need more memory than is free, or one process more CPUs than there are.
    """
    cluster = config.cluster
    for name in ("cpus_per_trainer", "cpus_per_view_worker"):
        if getattr(cluster, name) > machine.num_cpus:
            raise ConfigError(
                f"cluster.{name}={getattr(cluster, name):g} is not allowed: this machine has {machine.num_cpus} CPU(s), and "
                f"a process cannot use more; lower it"
            )
    of_trainers = cluster.num_trainers * cluster.cpus_with_finishers
    share = cluster.cpus_per_view_worker
    of_trainers_and_finishers = cluster.num_trainers * (1 + cluster.num_finishers)
    if cluster.num_view_workers == "auto":
        by_memory = num_processes_that_fit(machine) - of_trainers_and_finishers
        by_cpus = int((machine.num_cpus - of_trainers) / share) if share else MAX_AUTO_WORKERS
        workers = max(1, min(MAX_AUTO_WORKERS, by_cpus, by_memory))
        is_short_of_memory = by_memory < min(MAX_AUTO_WORKERS, by_cpus)
        least_cpus = 0 if is_short_of_memory else machine.num_cpus  # view workers take the CPUs that Ray has
    else:
        workers, least_cpus = cluster.num_view_workers, machine.num_cpus
    cpus = max(least_cpus, math.ceil(of_trainers + workers * share))
    of_processes = PROCESS_BYTES * (of_trainers_and_finishers + workers)
    # Ray refuses a large store on anything slower than /dev/shm.
    room = min(machine.free_bytes - of_processes, max(machine.shared_memory_bytes, REQUIRE_SHM_SIZE_THRESHOLD))
    least = _least_store(config, decoded_bytes)
    if room < least:
        raise ConfigError(
            f"this run needs {of_processes / 2**20:.0f} MiB for {workers} view worker(s) and {cluster.num_trainers} "
            f"trainer(s), and an object store of {least / 2**20:.0f} MiB (cluster.batches_in_flight="
            f"{cluster.batches_in_flight}, cluster.object_store_mib={cluster.object_store_mib}). This machine has only "
            f"{machine.free_bytes / 2**20:.0f} MiB of free memory and {machine.shared_memory_bytes / 2**20:.0f} MiB in "
            f"/dev/shm; {_advice(config, room, decoded_bytes)}"
        )
    return LocalRay(num_cpus=cpus, object_store_bytes=min(_wanted_store(config, workers, machine, decoded_bytes), room))


def num_processes_that_fit(machine: Machine) -> int:
    """Return how many processes take half of the free memory; the other half is for what they work on."""
    return machine.free_bytes // 2 // PROCESS_BYTES


def num_auto_workers(machine: Machine) -> int:
    """Return how many one-CPU tasks this machine can do at once, at most `MAX_AUTO_WORKERS`."""
    return max(1, min(MAX_AUTO_WORKERS, machine.num_cpus, num_processes_that_fit(machine)))


def plan_local_tasks(num_workers: int, machine: Machine) -> LocalRay:
    """Return the size of a Ray that is started on this machine for this many one-CPU tasks at once.

    Raises:
        ConfigError: their processes need more memory than is free.
    """
    store, needed = 2**29, num_workers * PROCESS_BYTES
    if needed + store > machine.free_bytes:
        raise ConfigError(
            f"{num_workers} worker(s) need {needed / 2**20:.0f} MiB and an object store of {store / 2**20:.0f} MiB, but this "
            f"machine has {machine.free_bytes / 2**20:.0f} MiB of free memory; ask for fewer"
        )
    return LocalRay(num_cpus=max(machine.num_cpus, num_workers), object_store_bytes=store)


def _least_store(config: RunConfig, decoded_bytes: float) -> int:
    """Return the bytes of object store without which the run cannot start."""
    cluster = config.cluster
    if cluster.object_store_mib != "auto":
        return cluster.object_store_mib * 2**20
    ahead = 1 if cluster.batches_in_flight == "auto" else cluster.batches_in_flight
    return max(_LEAST_STORE_BYTES, math.ceil((ahead + 1) * step_bytes(config, decoded_bytes) / USABLE_STORE_FRACTION))


def _wanted_store(config: RunConfig, num_view_workers: int, machine: Machine, decoded_bytes: float) -> int:
    cluster = config.cluster
    if cluster.object_store_mib != "auto":
        return cluster.object_store_mib * 2**20
    wanted = 3 * (cluster.num_batches_in_flight(num_view_workers) + 1) * step_bytes(config, decoded_bytes)
    if cluster.batches_in_flight == "auto":
        wanted = min(wanted, int(_SHARE_OF_MEMORY_FOR_STORE * machine.memory_bytes))
    return max(2**28, wanted)


def _advice(config: RunConfig, room: int, decoded_bytes: float) -> str:
    """Return the one thing to do if the machine has only this much room for the object store."""
    fits = _num_that_fit(config, float(room), decoded_bytes)
    if room < _LEAST_STORE_BYTES:
        return "lower cluster.num_view_workers or cluster.num_trainers"
    if config.cluster.object_store_mib != "auto":
        return f"set cluster.object_store_mib={room // 2**20}"
    if fits >= 1:
        return f"set cluster.batches_in_flight={fits}"
    return "use fewer images per step or smaller views"


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
    """Return the bytes that all object stores of the cluster have spilled since they started.

    Raises:
        StageError: no node answers.
    """
    reasons = []
    for node in ray.nodes():
        if node["Alive"]:  # any raylet answers for the whole cluster
            try:
                return _ask_raylet(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
            except grpc.RpcError as error:
                reasons.append(first_line(error))
    why = "; ".join(reasons) or "no node is alive"
    raise StageError(f"no node of the Ray cluster reports its spilled bytes ({why}); check the nodes with `ray status`")


def _ask_raylet(address: str) -> int:
    # Ray's own options: by default gRPC goes through `http_proxy`, which does not know the nodes.
    with init_grpc_channel(address, options=GLOBAL_GRPC_OPTIONS) as channel:
        reply = node_manager_pb2_grpc.NodeManagerServiceStub(channel).FormatGlobalMemoryInfo(
            node_manager_pb2.FormatGlobalMemoryInfoRequest(include_memory_info=False), timeout=_ANSWER_SECONDS
        )
    return int(reply.store_stats.spilled_bytes_total)
