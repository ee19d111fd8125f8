"""Where a run fits: labels, devices, counts, and what is said where it does not."""

import dataclasses
from typing import Any

import pytest

from hvp_ray.config import RunConfig
from hvp_ray.errors import ConfigError
from hvp_ray.launch.placement import Placement, check_places, decide_placement, lacks_a_label, place_in_part
from hvp_ray.recipes import get_recipe

RECIPE = get_recipe("simsiam-digits")


def _config(**cluster: Any) -> RunConfig:
    return dataclasses.replace(RECIPE, cluster=dataclasses.replace(RECIPE.cluster, **cluster))


def _place(config: RunConfig, free: dict[str, int] | None = None, **total: int) -> Placement:
    resources = {name: float(amount) for name, amount in total.items()}
    return decide_placement(config, resources, {n: float(a) for n, a in free.items()} if free else resources)


def test_without_labels_everything_may_be_anywhere() -> None:
    placement = _place(_config(num_trainers=2, num_view_workers="auto"), CPU=6)
    assert placement.num_view_workers == 4
    assert placement.trainer_resources == {"CPU": 1.0}
    assert placement.view_worker_resources == {"CPU": 1.0}


def test_labels_send_each_to_its_nodes_and_limit_their_number() -> None:
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
def test_gpus_that_do_not_suffice_for_trainers_and_view_workers_are_said(cluster: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _place(_config(renderer="dali-gpu", device="cuda", **cluster), CPU=64, GPU=1)


def test_several_trainers_never_share_a_gpu() -> None:
    with pytest.raises(ConfigError, match="nccl refuses"):
        _place(_config(num_trainers=2, num_view_workers=2, gpus_per_trainer=0.5), CPU=64, GPU=2)


def test_anywhere_ignores_labels() -> None:
    placement = _place(_config(placement="anywhere", num_view_workers=2), CPU=4, view=1, trainer=1)
    assert placement.trainer_resources == {"CPU": 1.0}
    assert placement.view_worker_resources == {"CPU": 1.0}


def test_labels_wait_for_nodes_that_are_to_come() -> None:
    named = {"placement": "labels", "num_view_workers": 16, "num_trainers": 2}
    placement = _place(_config(device="cpu", **named), CPU=0)
    assert placement.num_view_workers == 16
    assert placement.trainer_resources["trainer"] == 1.0
    placement = _place(_config(device="cuda", renderer="dali-gpu", **named), CPU=8, GPU=1)
    assert placement.device == "cuda"
    assert placement.trainer_resources["GPU"] == 1.0
    with pytest.raises(ConfigError, match="auto cannot tell"):
        _place(_config(**named), CPU=8, GPU=1)


def test_one_label_without_the_other_may_be_a_cluster_that_is_coming_up() -> None:
    assert lacks_a_label(_config(), {"view": 2.0})
    assert lacks_a_label(_config(), {"trainer": 2.0})
    assert not lacks_a_label(_config(), {"view": 2.0, "trainer": 1.0})
    assert not lacks_a_label(_config(), {"CPU": 2.0})
    assert not lacks_a_label(_config(placement="anywhere"), {"view": 2.0})


def test_elastic_training_on_several_nodes_needs_labels() -> None:
    config = _config(num_trainers=2, min_trainers=1, num_view_workers=2)
    nodes = {"node:10.0.0.1": 1.0, "node:__internal_head__": 1.0}
    assert decide_placement(config, {"CPU": 8.0, **nodes}, {"CPU": 8.0}).num_view_workers == 2
    with pytest.raises(ConfigError, match="needs nodes labelled `trainer`"):
        decide_placement(config, {"CPU": 8.0, "node:10.0.0.2": 1.0, **nodes}, {"CPU": 8.0})


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
def test_what_does_not_fit_is_refused_with_the_numbers(
    cluster: dict[str, Any], total: dict[str, int], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        _place(_config(**cluster), **total)


def test_auto_counts_what_is_free_and_a_number_what_there_is() -> None:
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
    total = {"CPU": 2.0, "trainer": 1.0, "view": 1.0}
    views = _config(num_view_workers=1)
    check_places(views, nodes, decide_placement(views, total, total))
    pixels = _config(num_view_workers=1, ship="pixels")
    nodes.append({"CPU": 1.0, "view": 1.0})
    total = {"CPU": 3.0, "trainer": 1.0, "view": 2.0}
    placement = decide_placement(pixels, total, total)
    assert placement.trainer_resources == {"CPU": 2.0, "trainer": 1.0}
    with pytest.raises(ConfigError, match=r"room for 0.*cluster.ship=pixels.*more CPUs"):
        check_places(pixels, nodes, placement)
    check_places(pixels, [{"CPU": 2.0, "trainer": 1.0}], placement)
    check_places(_config(ship="pixels", placement="labels"), nodes, placement)  # such a node may be added


def test_runs_that_share_a_cluster_fit_it_together() -> None:
    """The free resources are those that the first of them sees, or the last one: each decides for its own part."""
    total, nodes = {"CPU": 64.0, "GPU": 4.0}, [{"CPU": 64.0, "GPU": 4.0}]
    config = _config(device="cuda", num_view_workers="auto")
    for free in (total, {"CPU": 1.0}):
        placement = place_in_part(config, total, free, nodes=nodes, num_sharing=4)
        assert placement.num_view_workers == 15
        assert placement.trainer_resources == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(ConfigError, match=r"needs 1 GPU\(s\)"):
        place_in_part(config, total, total, nodes=nodes, num_sharing=5)
    dali = _config(device="cuda", renderer="dali-gpu", num_view_workers="auto")
    placement = place_in_part(dali, total, total, nodes=nodes, num_sharing=4)
    of_run = placement.trainer_resources["GPU"] + placement.num_view_workers * placement.view_worker_resources["GPU"]
    assert 4 * of_run <= 4.0 + 1e-6


def test_trainers_of_all_runs_that_share_a_cluster_must_fit_on_single_nodes() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}]
    config = _config(num_view_workers=1, cpus_per_trainer=2.0)
    place_in_part(config, {"CPU": 6.0}, {"CPU": 6.0}, nodes=nodes, num_sharing=2)
    with pytest.raises(ConfigError, match=r"3 trainer\(s\) are needed, .* room for 2"):
        place_in_part(config, {"CPU": 9.0}, {"CPU": 9.0}, nodes=nodes, num_sharing=3)
