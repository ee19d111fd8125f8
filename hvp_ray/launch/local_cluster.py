"""Size of the Ray that a run starts on this machine."""

import math

from ray._private.ray_constants import REQUIRE_SHM_SIZE_THRESHOLD

from hvp_ray.config import ClusterConfig
from hvp_ray.costs.prefetch import USABLE_STORE_FRACTION, batches_for_workers, batches_that_fit, prefetch_bytes
from hvp_ray.errors import ConfigError
from hvp_ray.stream.connect import LocalRay
from hvp_ray.stream.machine import PROCESS_BYTES, Machine, num_processes_that_fit

_LEAST_STORE_BYTES = 80 * 2**20
_USUAL_STORE_BYTES = 2**28
_STORE_SHARE_OF_MEMORY = 0.3
"""Ray's own default."""


def plan_local_ray(cluster: ClusterConfig, machine: Machine, bytes_per_step: int) -> LocalRay:
    """Return the size of a local Ray for one run.

    Ray gets as many CPUs as the run reserves, which may be more than the machine has: processes then take turns. The
    object store gets three times the prefetched batches, because a batch takes its space twice while it is copied and
    Ray spills at 0.8. With `batches_in_flight=auto` the store takes at most 30 % of the memory.

    Args:
        cluster: settings of the run.
        machine: resources of this machine.
        bytes_per_step: see `costs.prefetch.step_bytes`.

    Raises:
        ConfigError: the run needs more memory than is free, or one process needs more CPUs than there are.
    """
    for name in ("cpus_per_trainer", "cpus_per_view_worker"):
        if getattr(cluster, name) > machine.num_cpus:
            raise ConfigError(
                f"cluster.{name}={getattr(cluster, name):g} is not allowed: this machine has {machine.num_cpus} CPU(s), and "
                f"a process cannot use more; lower it"
            )
    num_workers, num_cpus = _num_workers_and_cpus(cluster, machine)
    of_processes = PROCESS_BYTES * (cluster.num_trainers * (1 + cluster.num_finishers) + num_workers)
    # Ray refuses a large store on anything slower than /dev/shm.
    room = min(machine.free_bytes - of_processes, max(machine.shared_memory_bytes, REQUIRE_SHM_SIZE_THRESHOLD))
    least, wanted = _store_range(cluster, num_workers, machine, bytes_per_step)
    if room < least:
        raise ConfigError(
            f"this run needs {of_processes / 2**20:.0f} MiB for {num_workers} view worker(s) and {cluster.num_trainers} "
            f"trainer(s), and an object store of {least / 2**20:.0f} MiB (cluster.batches_in_flight="
            f"{cluster.batches_in_flight}, cluster.object_store_mib={cluster.object_store_mib}). This machine has only "
            f"{machine.free_bytes / 2**20:.0f} MiB of free memory and {machine.shared_memory_bytes / 2**20:.0f} MiB in "
            f"/dev/shm; {_advice(cluster, room, bytes_per_step)}"
        )
    return LocalRay(num_cpus=num_cpus, object_store_bytes=min(wanted, room))


def _num_workers_and_cpus(cluster: ClusterConfig, machine: Machine) -> tuple[int, int]:
    """Return how many view workers to plan for, and the CPUs of Ray."""
    of_trainers, share = cluster.num_trainers * cluster.cpus_with_finishers, cluster.cpus_per_view_worker
    workers: int
    least_cpus = machine.num_cpus
    if cluster.num_view_workers != "auto":
        workers = cluster.num_view_workers
    else:
        by_memory = num_processes_that_fit(machine) - cluster.num_trainers * (1 + cluster.num_finishers)
        by_cpus = int((machine.num_cpus - of_trainers) / share) if share else cluster.max_view_workers
        by_cpus = min(cluster.max_view_workers, by_cpus)
        workers = max(1, min(by_cpus, by_memory))
        if by_memory < by_cpus:
            least_cpus = 0  # placement gives every free CPU a view worker
    return workers, max(least_cpus, math.ceil(of_trainers + workers * share))


def _store_range(cluster: ClusterConfig, num_workers: int, machine: Machine, bytes_per_step: int) -> tuple[int, int]:
    """Return the bytes of object store without which the run cannot start, and the bytes that it should have."""
    if cluster.object_store_mib != "auto":
        return cluster.object_store_mib * 2**20, cluster.object_store_mib * 2**20
    batches = cluster.batches_in_flight
    if batches != "auto":
        least, wanted = prefetch_bytes(batches, bytes_per_step), 3 * prefetch_bytes(batches, bytes_per_step)
    else:
        least = prefetch_bytes(1, bytes_per_step)
        wanted = 3 * prefetch_bytes(batches_for_workers(cluster, num_workers), bytes_per_step)
        wanted = min(wanted, int(_STORE_SHARE_OF_MEMORY * machine.memory_bytes))
    return max(_LEAST_STORE_BYTES, math.ceil(least / USABLE_STORE_FRACTION)), max(_USUAL_STORE_BYTES, wanted)


def _advice(cluster: ClusterConfig, room: int, bytes_per_step: int) -> str:
    """Return what to do if this much room is left for the object store."""
    if room < _LEAST_STORE_BYTES:
        return "lower cluster.num_view_workers or cluster.num_trainers"
    if cluster.object_store_mib != "auto":
        return f"set cluster.object_store_mib={room // 2**20}"
    fits = batches_that_fit(float(room), bytes_per_step)
    return f"set cluster.batches_in_flight={fits}" if fits >= 1 else "use fewer images per step or smaller views"
