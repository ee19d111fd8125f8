"""What a run resolves to on a cluster, and which runs are refused: labels, devices, counts, object stores."""

import dataclasses
from typing import Any

import pytest

from hvp_ray.config import RunConfig
from hvp_ray.errors import ConfigError
from hvp_ray.launch.placement import (
    ClusterState,
    decide_batches_in_flight,
    lacks_a_label,
    resolve_on_cluster,
    store_for_prefetch,
)
from hvp_ray.recipes import get_recipe
from hvp_ray.resolved_run import ResolvedRun
from tests.helpers import tiny_config

RECIPE = get_recipe("simsiam-digits")


def _config(**cluster: Any) -> RunConfig:
    return dataclasses.replace(RECIPE, cluster=dataclasses.replace(RECIPE.cluster, **cluster))


def _resolve(
    config: RunConfig,
    total: dict[str, float],
    free: dict[str, float] | None = None,
    nodes: list[dict[str, float]] | None = None,
    num_sharing: int = 1,
) -> ResolvedRun:
    """Resolve on nodes with large object stores; by default on one node."""
    total, free = ({name: float(amount) for name, amount in part.items()} for part in (total, free or total))
    stores = [node | {"object_store_memory": 1e12} for node in nodes or [total]]
    state = ClusterState(total=total, free=free, nodes=stores, num_sharing=num_sharing)
    return resolve_on_cluster(config, state, 1000)


def _place(config: RunConfig, free: dict[str, float] | None = None, **total: float) -> ResolvedRun:
    return _resolve(config, total, free)


def test_without_labels_everything_may_be_anywhere() -> None:
    placement = _place(_config(num_trainers=2, num_view_workers="auto"), CPU=6)
    assert placement.num_view_workers == 4
    assert placement.trainer_resources == {"CPU": 1.0}
    assert placement.view_worker_resources == {"CPU": 1.0}


def test_labels_place_processes_and_limit_their_number() -> None:
    placement = _place(_config(num_view_workers="auto"), CPU=40, view=3, trainer=2)
    assert placement.trainer_resources == {"CPU": 1.0, "trainer": 1.0}
    assert placement.view_worker_resources == {"CPU": 1.0, "view": 1.0}
    assert placement.num_view_workers == 3


def test_a_gpu_node_may_do_both() -> None:
    config = _config(renderer="dali-gpu", num_view_workers=2, gpus_per_dali_worker=0.2)
    placement = _place(config, CPU=8, GPU=1, view=2, trainer=1)
    assert placement.device == "cuda"
    assert placement.trainer_resources == {"CPU": 1.0, "GPU": 0.6, "trainer": 1.0}
    assert placement.view_worker_resources == {"CPU": 1.0, "GPU": 0.2, "view": 1.0}


def test_trainers_leave_view_workers_their_share_of_each_gpu() -> None:
    def share(gpus: int, trainers: int, workers: int | str, **cluster: Any) -> float:
        config = _config(num_trainers=trainers, num_view_workers=workers, renderer="dali-gpu", **cluster)
        return _place(config, CPU=64, GPU=gpus).trainer_resources["GPU"]

    assert share(2, 1, 3) == 1.0  # a GPU to spare
    assert share(1, 1, 3) == pytest.approx(0.7)
    assert share(1, 1, "auto") == pytest.approx(0.9)
    assert share(2, 2, 3) == pytest.approx(0.8)  # two beside one of them
    assert share(1, 1, 2, gpus_per_trainer=0.5) == 0.5


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        ({"num_view_workers": 10}, "too little for 1 trainer"),
        ({"num_view_workers": 2, "gpus_per_trainer": 0.9}, "too little for 1 trainer"),
        ({"num_view_workers": 2, "gpus_per_trainer": 0.4, "num_trainers": 2}, "needs 2 GPU"),
    ],
)
def test_too_few_gpus_for_trainers_and_view_workers_are_refused(cluster: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _place(_config(renderer="dali-gpu", device="cuda", **cluster), CPU=64, GPU=1)


def test_several_trainers_never_share_a_gpu() -> None:
    with pytest.raises(ConfigError, match="nccl refuses"):
        _place(_config(num_trainers=2, num_view_workers=2, gpus_per_trainer=0.5), CPU=64, GPU=2)


def test_anywhere_ignores_labels() -> None:
    placement = _place(_config(placement="anywhere", num_view_workers=2), CPU=4, view=1, trainer=1)
    assert placement.trainer_resources == {"CPU": 1.0}
    assert placement.view_worker_resources == {"CPU": 1.0}


def test_labels_wait_for_nodes_that_will_join() -> None:
    named = {"placement": "labels", "num_view_workers": 16, "num_trainers": 2}
    placement = _place(_config(device="cpu", **named), CPU=0)
    assert placement.num_view_workers == 16
    assert placement.trainer_resources["trainer"] == 1.0
    placement = _place(_config(device="cuda", renderer="dali-gpu", **named), CPU=8, GPU=1)
    assert placement.device == "cuda"
    assert placement.trainer_resources["GPU"] == 1.0
    with pytest.raises(ConfigError, match="auto cannot tell"):
        _place(_config(**named), CPU=8, GPU=1)


def test_one_label_without_the_other_may_be_a_starting_cluster() -> None:
    assert lacks_a_label(_config().cluster, {"view": 2.0})
    assert lacks_a_label(_config().cluster, {"trainer": 2.0})
    assert not lacks_a_label(_config().cluster, {"view": 2.0, "trainer": 1.0})
    assert not lacks_a_label(_config().cluster, {"CPU": 2.0})
    assert not lacks_a_label(_config(placement="anywhere").cluster, {"view": 2.0})


def test_elastic_training_on_several_nodes_needs_labels() -> None:
    config = _config(num_trainers=2, min_trainers=1, num_view_workers=2)
    nodes = {"node:10.0.0.1": 1.0, "node:__internal_head__": 1.0}
    assert _resolve(config, {"CPU": 8.0, **nodes}).num_view_workers == 2
    with pytest.raises(ConfigError, match="needs nodes labelled `trainer`"):
        _resolve(config, {"CPU": 8.0, "node:10.0.0.2": 1.0, **nodes})


@pytest.mark.parametrize(
    ("cluster", "total", "says"),
    [
        ({"num_trainers": 2}, {"CPU": 9, "trainer": 1, "view": 4}, "room for 1; lower"),
        ({"num_view_workers": 5}, {"CPU": 9, "trainer": 1, "view": 4}, "room for 4 view worker"),
        ({"num_view_workers": 5}, {"CPU": 4}, "room for 3 view worker"),
        ({"device": "cuda"}, {"CPU": 4}, "needs 1 GPU"),
        ({"renderer": "dali-gpu"}, {"CPU": 4}, "no node of the cluster has a GPU"),
    ],
)
def test_run_that_does_not_fit_is_refused_with_the_numbers(
    cluster: dict[str, Any], total: dict[str, int], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        _place(_config(**cluster), **total)


def test_workers_that_reserve_nothing_are_64_at_most_unless_a_number_is_asked_for() -> None:
    assert _place(_config(num_view_workers="auto", cpus_per_view_worker=0.0), CPU=8).num_view_workers == 64
    assert _place(_config(num_view_workers=100, cpus_per_view_worker=0.0), CPU=8).num_view_workers == 100


def test_auto_counts_free_resources_and_a_number_all_resources() -> None:
    assert _place(_config(num_view_workers="auto"), free={"CPU": 3}, CPU=8).num_view_workers == 2
    assert _place(_config(num_view_workers=5), free={"CPU": 3}, CPU=8).num_view_workers == 5


def test_elastic_training_needs_room_for_the_fewest_trainers_only() -> None:
    config = _config(num_trainers=2, min_trainers=1, num_view_workers=2)
    assert _place(config, CPU=4, GPU=1, view=2, trainer=1).device == "cuda"
    with pytest.raises(ConfigError, match="room for 1"):
        _place(_config(num_trainers=2, num_view_workers=2), CPU=4, view=2, trainer=1)


def test_elastic_batches_must_be_divisible_for_every_number_of_trainers() -> None:
    assert _config(num_trainers=2, min_trainers=1).images_per_rank == RECIPE.training.images_per_step
    with pytest.raises(ConfigError, match="multiple of every number from cluster.min_trainers=1"):
        _config(num_trainers=3, min_trainers=1)  # 32 images
    with pytest.raises(ConfigError, match=r"cluster\.min_trainers=3"):
        _config(num_trainers=2, min_trainers=3)


def test_trainers_must_fit_on_single_nodes() -> None:
    """Two nodes of one CPU each are two CPUs, and no place for a trainer with its view finisher."""
    nodes = [{"CPU": 1.0, "trainer": 1.0}, {"CPU": 1.0, "view": 1.0}]
    _resolve(_config(num_view_workers=1), {"CPU": 2.0, "trainer": 1.0, "view": 1.0}, nodes=nodes)
    pixels = _config(num_view_workers=1, ship="pixels")
    nodes.append({"CPU": 1.0, "view": 1.0})
    total = {"CPU": 3.0, "trainer": 1.0, "view": 2.0}
    with pytest.raises(ConfigError, match=r"room for 0.*cluster.ship=pixels.*more CPUs"):
        _resolve(pixels, total, nodes=nodes)
    large = [{"CPU": 2.0, "trainer": 1.0}, {"CPU": 1.0, "view": 1.0}]
    assert _resolve(pixels, total, nodes=large).trainer_resources == {"CPU": 2.0, "trainer": 1.0}
    waiting = _config(num_view_workers=1, ship="pixels", placement="labels", device="cpu")
    _resolve(waiting, total, nodes=nodes)  # such a node may be added


def test_runs_that_share_a_cluster_fit_it_together() -> None:
    """Free resources depend on which run starts first, so each run decides for its own part."""
    total = {"CPU": 64.0, "GPU": 4.0}
    config = _config(device="cuda", num_view_workers="auto")
    for free in (total, {"CPU": 1.0}):
        resolved = _resolve(config, total, free, num_sharing=4)
        assert resolved.num_view_workers == 15
        assert resolved.trainer_resources == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(ConfigError, match=r"needs 1 GPU\(s\)"):
        _resolve(config, total, num_sharing=5)
    resolved = _resolve(_config(device="cuda", renderer="dali-gpu", num_view_workers="auto"), total, num_sharing=4)
    of_run = resolved.trainer_resources["GPU"] + resolved.num_view_workers * resolved.view_worker_resources["GPU"]
    assert 4 * of_run <= 4.0 + 1e-6


def test_trainers_of_all_runs_that_share_a_cluster_must_fit_on_single_nodes() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}]
    config = _config(num_view_workers=1, cpus_per_trainer=2.0)
    _resolve(config, {"CPU": 6.0}, nodes=nodes, num_sharing=2)
    with pytest.raises(ConfigError, match=r"3 trainer\(s\) are needed, .* room for 2"):
        _resolve(config, {"CPU": 9.0}, nodes=nodes, num_sharing=3)


TRAINER, VIEW = {"CPU": 1.0, "trainer": 1.0}, {"CPU": 1.0, "view": 1.0}


def _node(store: float, **resources: float) -> dict[str, float]:
    return {"object_store_memory": store, **resources}


def test_one_node_without_labels_is_its_store() -> None:
    anywhere = {"CPU": 1.0}
    assert store_for_prefetch(_config(num_trainers=2).cluster, [_node(7.0, CPU=4)], anywhere, anywhere) == 7.0


def test_view_nodes_hold_prefetch_together_and_each_trainer_node_that_of_its_trainers() -> None:
    cluster = _config(num_trainers=2).cluster
    head, views = _node(1000.0), [_node(10.0, CPU=1, view=1), _node(20.0, CPU=1, view=1)]
    two_each = _node(40.0, CPU=2, trainer=2)
    assert store_for_prefetch(cluster, [head, *views, two_each], TRAINER, VIEW) == 30.0
    one_each = [_node(12.0, CPU=1, trainer=1), _node(40.0, CPU=1, trainer=1)]
    of_small_node = store_for_prefetch(cluster, [head, *views, *one_each], TRAINER, VIEW)
    assert of_small_node == 24.0  # it holds the batches of one trainer of two


def test_sum_of_stores_does_not_hide_a_small_view_node() -> None:
    """Four batches and one in use need 5 of 7 usable steps; the view node's store holds half of that."""
    cluster = _config(batches_in_flight=4).cluster
    nodes = [_node(8.0), _node(3.5, CPU=1, view=1), _node(16.0, CPU=1, trainer=1)]
    with pytest.raises(ConfigError, match="without spilling"):
        decide_batches_in_flight(cluster, 1, store_for_prefetch(cluster, nodes, TRAINER, VIEW), 1)


def test_automatic_prefetch_is_enough_for_all_workers_or_what_the_store_holds() -> None:
    def batches(num_view_workers: int, steps_of_store: float, **cluster: object) -> int:
        chosen = tiny_config("x", cluster={"batches_in_flight": "auto", "num_trainers": 2} | cluster)
        return decide_batches_in_flight(chosen.cluster, num_view_workers, steps_of_store * 100, 100)

    assert batches(1, 1000.0) == 4
    assert batches(16, 1000.0) == 10  # 16 / 2 + 2
    assert batches(16, 1000.0, batches_in_flight=5) == 5
    assert batches(16, 10.0) == 6  # 7 steps are 70 % of the store, and one of them is in use
    with pytest.raises(ConfigError, match="fewer images per step"):
        batches(16, 1.0)
    with pytest.raises(ConfigError, match="batches_in_flight=6"):
        batches(16, 10.0, batches_in_flight=9)


def test_runs_that_share_a_cluster_share_its_object_store() -> None:
    state = {"total": {"CPU": 8.0}, "free": {"CPU": 8.0}, "nodes": [{"CPU": 8.0, "object_store_memory": 10_000.0}]}
    config = _config(num_view_workers=1, batches_in_flight="auto")
    alone, shared = (
        resolve_on_cluster(config, ClusterState(**state, num_sharing=count), 1000).batches_in_flight for count in (1, 2)
    )
    assert (alone, shared) == (4, 2)
