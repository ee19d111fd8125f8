"""CPUs and memory of this machine, and how many of our processes they hold."""

from dataclasses import dataclass

from ray._common.utils import get_system_memory
from ray._private.utils import estimate_available_memory, get_num_cpus, get_shared_memory_bytes

from hvp_ray.errors import ConfigError
from hvp_ray.stream.connect import LocalRay

MAX_AUTO_WORKERS = 64

PROCESS_BYTES = 400 * 2**20
"""Memory that a trainer or view worker shares with no other process. Measured for simsiam-digits: 415 MiB."""

_STORE_OF_TASKS = 2**29


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Resources of this machine, or of the container around this process."""

    num_cpus: int
    memory_bytes: int
    free_bytes: int
    shared_memory_bytes: int
    """Free space of /dev/shm."""


def this_machine() -> Machine:
    """Read the resources from the operating system and the container's limits."""
    return Machine(
        num_cpus=max(1, int(get_num_cpus(override_docker_cpu_warning=True))),
        memory_bytes=get_system_memory(),
        free_bytes=estimate_available_memory(),
        shared_memory_bytes=get_shared_memory_bytes(),
    )


def num_processes_that_fit(machine: Machine) -> int:
    """Return how many processes fit half of the free memory; the other half holds their data."""
    return machine.free_bytes // 2 // PROCESS_BYTES


def num_tasks_that_fit(machine: Machine) -> int:
    """Return how many one-CPU tasks this machine runs at once, from 1 to `MAX_AUTO_WORKERS`."""
    return max(1, min(MAX_AUTO_WORKERS, machine.num_cpus, num_processes_that_fit(machine)))


def plan_local_tasks(num_workers: int, machine: Machine) -> LocalRay:
    """Return the size of a local Ray for this many one-CPU tasks at once.

    Raises:
        ConfigError: their processes need more memory than is free.
    """
    needed = num_workers * PROCESS_BYTES
    if needed + _STORE_OF_TASKS > machine.free_bytes:
        raise ConfigError(
            f"{num_workers} worker(s) need {needed / 2**20:.0f} MiB and an object store of {_STORE_OF_TASKS / 2**20:.0f} "
            f"MiB, but this machine has {machine.free_bytes / 2**20:.0f} MiB of free memory; ask for fewer"
        )
    return LocalRay(num_cpus=max(machine.num_cpus, num_workers), object_store_bytes=_STORE_OF_TASKS)
