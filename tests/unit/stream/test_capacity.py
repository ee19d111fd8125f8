"""Which object stores the look-ahead has to fit into, on one node and on several."""

import pytest

from hvp_ray.errors import ConfigError
from hvp_ray.stream.capacity import (
    batch_bytes,
    check_store,
    decide_look_ahead,
    look_ahead_bytes,
    store_for_look_ahead,
    store_to_start,
)
from tests.helpers import tiny_config

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


def test_store_of_a_ray_of_ones_own() -> None:
    large = {"training": {"images_per_step": 18_000_000}}
    config = tiny_config("x", **large, cluster={"batches_in_flight": 9})
    assert store_to_start(config, 1) == 3 * look_ahead_bytes(config) > 2**28
    assert store_to_start(tiny_config("x"), 1) == 2**28
    assert store_to_start(tiny_config("x", cluster={"object_store_mib": 100}), 1) == 100 * 2**20
    by_itself = tiny_config("x", **large, cluster={"batches_in_flight": "auto"})
    assert store_to_start(by_itself, 64) < 3 * 67 * batch_bytes(by_itself)  # 30 % of the memory
