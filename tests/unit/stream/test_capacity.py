"""Which object stores the look-ahead has to fit into, on one node and on several."""

import dataclasses
import re

import pytest

from hvp_ray.errors import ConfigError
from hvp_ray.stream.capacity import (
    PROCESS_BYTES,
    Machine,
    batch_bytes,
    check_store,
    decide_look_ahead,
    look_ahead_bytes,
    num_auto_workers,
    plan_local_ray,
    plan_local_tasks,
    store_for_look_ahead,
    this_machine,
)
from tests.helpers import tiny_config

MACHINE = Machine(num_cpus=4, memory_bytes=16 * 2**30, free_bytes=12 * 2**30, shared_memory_bytes=8 * 2**30)
TRAINER, VIEW = {"CPU": 1.0, "trainer": 1.0}, {"CPU": 1.0, "view": 1.0}


def _node(store: float, *, alive: bool = True, **resources: float) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"object_store_memory": store, **resources}}


def test_one_node_without_labels_is_its_store() -> None:
    config = tiny_config("x", cluster={"num_trainers": 2})
    assert store_for_look_ahead(config, [_node(7.0, CPU=4)], {"CPU": 1.0}, {"CPU": 1.0}) == 7.0


def test_view_nodes_hold_it_together_and_each_trainer_node_for_its_trainers() -> None:
    config = tiny_config("x", cluster={"num_trainers": 2})
    head, dead = _node(1000.0), _node(1000.0, alive=False, CPU=1, view=1, trainer=1)
    views = [_node(10.0, CPU=1, view=1), _node(20.0, CPU=1, view=1)]
    two_each = _node(40.0, CPU=2, trainer=2)
    assert store_for_look_ahead(config, [head, dead, *views, two_each], TRAINER, VIEW) == 30.0
    one_each = [_node(12.0, CPU=1, trainer=1), _node(40.0, CPU=1, trainer=1)]
    assert (
        store_for_look_ahead(config, [head, *views, *one_each], TRAINER, VIEW) == 24.0
    )  # the small one has half of it


def test_sum_of_stores_does_not_hide_a_small_view_node() -> None:
    config = tiny_config("x", cluster={"num_trainers": 1})
    needed = float(look_ahead_bytes(config))
    nodes = [_node(needed), _node(0.5 * needed, CPU=1, view=1), _node(2.0 * needed, CPU=1, trainer=1)]
    with pytest.raises(ConfigError, match="without spilling"):
        check_store(config, store_for_look_ahead(config, nodes, TRAINER, VIEW))


def test_look_ahead_by_itself_is_enough_for_all_workers_or_what_the_store_holds() -> None:
    per_step = 2 * batch_bytes(tiny_config("x", cluster={"num_trainers": 2}))

    def ahead(num_view_workers: int, steps_of_store: float, **cluster: object) -> int:
        chosen = tiny_config("x", cluster={"batches_in_flight": "auto", "num_trainers": 2} | cluster)
        decided = decide_look_ahead(chosen, num_view_workers, steps_of_store * per_step)
        assert decided.cluster.batches_in_flight == decided.cluster.num_batches_in_flight()
        return decided.cluster.num_batches_in_flight()

    assert ahead(1, 1000.0) == 4
    assert ahead(16, 1000.0) == 10  # 16 / 2 + 2
    assert ahead(16, 1000.0, batches_in_flight=5) == 5
    assert ahead(16, 10.0) == 6  # 7 steps are 70 % of the store, and one of them is in use
    with pytest.raises(ConfigError, match="fewer images per step"):
        ahead(16, 1.0)
    with pytest.raises(ConfigError, match="batches_in_flight=6"):
        ahead(16, 10.0, batches_in_flight=9)


def test_decoded_pixels_lie_in_the_store_beside_the_views() -> None:
    views, pixels = (tiny_config("x", cluster={"ship": ship}) for ship in ("views", "pixels"))
    assert look_ahead_bytes(views, 1000.0) == 4 * batch_bytes(views)
    assert look_ahead_bytes(pixels, 1000.0) == 4 * (batch_bytes(views) + 16 * 1000)


def test_local_ray_has_three_times_the_prefetched_batches_and_the_cpus_that_the_run_reserves() -> None:
    config = tiny_config("x", training={"images_per_step": 180_000}, cluster={"batches_in_flight": 9})
    local = plan_local_ray(config, MACHINE)
    assert local.object_store_bytes == 3 * look_ahead_bytes(config) > 2**28
    assert local.num_cpus == 4
    assert plan_local_ray(tiny_config("x"), MACHINE).object_store_bytes == 2**28
    assert (
        plan_local_ray(tiny_config("x", cluster={"object_store_mib": 100}), MACHINE).object_store_bytes == 100 * 2**20
    )
    assert plan_local_ray(tiny_config("x", cluster={"num_view_workers": 9}), MACHINE).num_cpus == 10


def test_local_ray_shrinks_to_the_machine_if_the_batches_still_fit() -> None:
    large = {"training": {"images_per_step": 1_000_000}}
    by_itself = tiny_config("x", **large, cluster={"batches_in_flight": "auto", "num_view_workers": "auto"})
    assert plan_local_ray(by_itself, MACHINE).object_store_bytes == int(0.3 * MACHINE.memory_bytes)
    config = tiny_config("x", **large, cluster={"batches_in_flight": 4})
    store = plan_local_ray(config, MACHINE).object_store_bytes
    assert store < 3 * look_ahead_bytes(config)
    check_store(config, float(store))


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
def test_what_the_machine_cannot_give_is_refused_with_what_it_can(
    cluster: dict[str, object], machine: dict[str, int], advice: str
) -> None:
    config = tiny_config("x", training={"images_per_step": 160_000}, cluster=cluster)
    smaller = dataclasses.replace(MACHINE, **machine)
    with pytest.raises(ConfigError, match=advice) as refusal:
        plan_local_ray(config, smaller)
    setting = re.search(r"set cluster\.(\w+)=(\d+)$", str(refusal.value))
    if setting is not None:  # the advice is one that helps
        name, value = setting.group(1), int(setting.group(2))
        plan_local_ray(
            dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, **{name: value})), smaller
        )


def test_view_workers_by_themselves_are_as_many_as_the_memory_holds() -> None:
    config = tiny_config("x", cluster={"num_view_workers": "auto"})
    many = dataclasses.replace(MACHINE, num_cpus=64)
    assert plan_local_ray(config, many).num_cpus == 1 + 12 * 2**30 // 2 // PROCESS_BYTES - 1
    assert plan_local_ray(config, MACHINE).num_cpus == 4
    assert num_auto_workers(many) == 12 * 2**30 // 2 // PROCESS_BYTES
    assert num_auto_workers(MACHINE) == 4


def test_tasks_that_the_memory_does_not_hold_are_refused() -> None:
    assert plan_local_tasks(8, MACHINE).num_cpus == 8
    with pytest.raises(ConfigError, match=r"1000 worker\(s\) need .*ask for fewer"):
        plan_local_tasks(1000, MACHINE)


def test_this_machine_can_be_measured() -> None:
    machine = this_machine()
    assert machine.num_cpus >= 1
    assert 0 < machine.free_bytes <= machine.memory_bytes
    assert machine.shared_memory_bytes > 0
