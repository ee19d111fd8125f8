"""The size of a Ray on this machine: what the run needs, within what the machine has."""

import dataclasses
import re

import pytest

from hvp_ray.config import RunConfig
from hvp_ray.costs.prefetch import batch_bytes, prefetch_bytes
from hvp_ray.errors import ConfigError
from hvp_ray.launch.local_cluster import plan_local_ray
from hvp_ray.launch.placement import decide_batches_in_flight
from hvp_ray.stream.connect import LocalRay
from hvp_ray.stream.machine import PROCESS_BYTES, Machine
from tests.helpers import tiny_config

MACHINE = Machine(num_cpus=4, memory_bytes=16 * 2**30, free_bytes=12 * 2**30, shared_memory_bytes=8 * 2**30)


def _plan(config: RunConfig, machine: Machine = MACHINE) -> LocalRay:
    return plan_local_ray(config.cluster, machine, batch_bytes(config) * config.cluster.num_trainers)


def test_local_ray_has_three_times_the_prefetched_batches_and_the_cpus_that_the_run_reserves() -> None:
    config = tiny_config("x", training={"images_per_step": 180_000}, cluster={"batches_in_flight": 9})
    local = _plan(config)
    assert local.object_store_bytes == 3 * prefetch_bytes(9, batch_bytes(config)) > 2**28
    assert local.num_cpus == 4
    assert _plan(tiny_config("x")).object_store_bytes == 2**28
    assert _plan(tiny_config("x", cluster={"object_store_mib": 100})).object_store_bytes == 100 * 2**20
    assert _plan(tiny_config("x", cluster={"num_view_workers": 9})).num_cpus == 10


def test_local_ray_shrinks_to_the_machine_if_the_batches_still_fit() -> None:
    large = {"training": {"images_per_step": 1_000_000}}
    by_itself = tiny_config("x", **large, cluster={"batches_in_flight": "auto", "num_view_workers": "auto"})
    assert _plan(by_itself).object_store_bytes == int(0.3 * MACHINE.memory_bytes)
    config = tiny_config("x", **large, cluster={"batches_in_flight": 4})
    store = _plan(config).object_store_bytes
    assert store < 3 * prefetch_bytes(4, batch_bytes(config))
    assert decide_batches_in_flight(config.cluster, 1, float(store), batch_bytes(config)) == 4


@pytest.mark.parametrize(
    ("cluster", "machine", "advice"),
    [
        ({"batches_in_flight": 1_000_000}, {}, r"set cluster.batches_in_flight=(\d+)$"),
        ({"object_store_mib": 1_000_000}, {}, r"set cluster.object_store_mib=(\d+)$"),
        ({"num_view_workers": 1000}, {}, "lower cluster.num_view_workers"),
        ({"num_trainers": 8}, {"free_bytes": 2**30}, "or cluster.num_trainers"),
        ({"cpus_per_view_worker": 5.0}, {}, "cluster.cpus_per_view_worker=5 .* 4 CPU"),
        ({"cpus_per_trainer": float("inf")}, {}, "cluster.cpus_per_trainer=inf .* 4 CPU"),
        ({"batches_in_flight": 1000}, {"free_bytes": 2**40, "shared_memory_bytes": 2**26}, r"batches_in_flight=\d\d$"),
    ],
)
def test_refusal_advises_a_setting_that_fits_the_machine(
    cluster: dict[str, object], machine: dict[str, int], advice: str
) -> None:
    config = tiny_config("x", training={"images_per_step": 160_000}, cluster=cluster)
    smaller = dataclasses.replace(MACHINE, **machine)
    with pytest.raises(ConfigError, match=advice) as refusal:
        _plan(config, smaller)
    setting = re.search(r"set cluster\.(\w+)=(\d+)$", str(refusal.value))
    if setting is not None:  # the advice helps
        name, value = setting.group(1), int(setting.group(2))
        _plan(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, **{name: value})), smaller)


def test_automatic_view_workers_are_as_many_as_the_memory_holds() -> None:
    config = tiny_config("x", cluster={"num_view_workers": "auto"})
    many = dataclasses.replace(MACHINE, num_cpus=64)
    assert _plan(config, many).num_cpus == 1 + 12 * 2**30 // 2 // PROCESS_BYTES - 1
    assert _plan(config).num_cpus == 4
