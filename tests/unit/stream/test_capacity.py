"""Which object stores the look-ahead has to fit into, on one node and on several."""

import pytest

from hvp_ray.errors import ConfigError
from hvp_ray.stream.capacity import check_store, look_ahead_bytes, store_for_look_ahead
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
