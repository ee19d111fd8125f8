"""How many processes and tasks a machine holds."""

import dataclasses

import pytest

from hvp_ray.errors import ConfigError
from hvp_ray.stream.machine import PROCESS_BYTES, Machine, num_tasks_that_fit, plan_local_tasks, this_machine

MACHINE = Machine(num_cpus=4, memory_bytes=16 * 2**30, free_bytes=12 * 2**30, shared_memory_bytes=8 * 2**30)


def test_tasks_are_as_many_as_cpus_and_memory_hold() -> None:
    assert num_tasks_that_fit(MACHINE) == 4
    many = dataclasses.replace(MACHINE, num_cpus=64)
    assert num_tasks_that_fit(many) == 12 * 2**30 // 2 // PROCESS_BYTES


def test_tasks_that_the_memory_does_not_hold_are_refused() -> None:
    assert plan_local_tasks(8, MACHINE).num_cpus == 8
    with pytest.raises(ConfigError, match=r"1000 worker\(s\) need .*ask for fewer"):
        plan_local_tasks(1000, MACHINE)


def test_this_machine_can_be_measured() -> None:
    machine = this_machine()
    assert machine.num_cpus >= 1
    assert 0 < machine.free_bytes <= machine.memory_bytes
    assert machine.shared_memory_bytes > 0
