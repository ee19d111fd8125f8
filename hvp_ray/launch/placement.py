"""Where a run fits on a cluster: which device, which renderer, how many view workers, and on nodes of which label.

A node says what it is for by a Ray resource: `view` (so many view workers may be there), `trainer` (so many trainers).
`ray start --resources '{"view": 4}'` sets it. Where no node says anything, everything may be anywhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvp_ray.config import RendererName, RunConfig
from hvp_ray.errors import ConfigError
from hvp_ray.stream.capacity import MAX_AUTO_WORKERS, room_for

VIEW_LABEL, TRAINER_LABEL = "view", "trainer"
AUTO_DALI_WORKERS_PER_GPU = 1
"""A second one beside a trainer gave no more images per second on an H100 (docs/experiments.md)."""

_LEAST_TRAINER_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What is asked of Ray."""

    renderer: RendererName
    device: str
    """cpu or cuda, for the trainers."""
    num_view_workers: int
    trainer_resources: dict[str, float]
    """Of one trainer."""
    view_worker_resources: dict[str, float]
    """Of one view worker."""


def decide_placement(config: RunConfig, total: Mapping[str, float], free: Mapping[str, float]) -> Placement:
    """Fit the run to the cluster.

    Args:
        config: the run.
        total: Ray resource -> amount of the whole cluster.
        free: the same, of what nobody has reserved.

    Raises:
        ConfigError: the cluster has too little; the message has the numbers.
    """
    cluster = config.cluster
    device = _decide_device(config, total.get("GPU", 0.0))
    renderer = cluster.chosen_renderer
    if renderer == "dali-gpu" and total.get("GPU", 0.0) == 0 and cluster.placement != "labels":
        raise ConfigError("cluster.renderer=dali-gpu, but no node of the cluster has a GPU; choose cpu or dali-cpu")
    trainer = {"CPU": cluster.cpus_with_finishers}
    worker = {"CPU": cluster.cpus_per_view_worker}
    if renderer == "dali-gpu":
        worker["GPU"] = cluster.gpus_per_dali_worker
    if _uses_label(config, TRAINER_LABEL, total):
        trainer[TRAINER_LABEL] = 1.0
        _check_trainers(config, total)
    elif cluster.min_trainers is not None and _num_nodes(total) > 1:
        raise ConfigError(
            f"cluster.min_trainers={cluster.min_trainers} on a cluster of several nodes needs nodes labelled "
            f"`{TRAINER_LABEL}` (ray start --resources '{{\"{TRAINER_LABEL}\": 1}}'): without them Ray "
            f"counts CPUs that view workers use as free, and waits for trainers that never fit"
        )
    if _uses_label(config, VIEW_LABEL, total):
        worker[VIEW_LABEL] = 1.0
    num_view_workers = _decide_num_view_workers(config, total, free, worker)
    if device == "cuda":
        trainer["GPU"] = _decide_gpu_share(config, total.get("GPU", 0.0), num_view_workers * worker.get("GPU", 0.0))
    return Placement(
        renderer=renderer,
        device=device,
        num_view_workers=num_view_workers,
        trainer_resources=trainer,
        view_worker_resources=worker,
    )


def place_in_part(
    config: RunConfig,
    total: Mapping[str, float],
    free: Mapping[str, float],
    *,
    nodes: Sequence[Mapping[str, float]],
    num_sharing: int = 1,
) -> Placement:
    """Fit the run to the cluster, or to an equal part of it if several such runs share the cluster.

    Args:
        config: the run.
        total: Ray resource -> amount of the whole cluster.
        free: the same, of what nobody has reserved.
        nodes: the same, of every node.
        num_sharing: how many runs share the cluster, this one included.

    Raises:
        ConfigError: the cluster, or the part, has too little; the message has the numbers.
    """
    if num_sharing > 1:
        # What the other runs have reserved by now says nothing about the part of this one.
        total = free = {name: amount / num_sharing for name, amount in total.items()}
    placement = decide_placement(config, total, free)
    check_places(config, nodes, placement, num_sharing=num_sharing)
    return placement


def check_places(
    config: RunConfig, nodes: Sequence[Mapping[str, float]], placement: Placement, *, num_sharing: int = 1
) -> None:
    """Check that the trainers fit on single nodes, not only on all of them together: else Ray waits without a word.

    Args:
        config: the run.
        nodes: Ray resource -> amount, of every node.
        placement: what a trainer reserves.
        num_sharing: how many runs like this one are to fit.

    Raises:
        ConfigError: too few nodes are large enough.
    """
    cluster, needs = config.cluster, placement.trainer_resources
    needed = (cluster.min_trainers or cluster.num_trainers) * num_sharing
    places = sum(room_for(node, needs) for node in nodes)
    if places >= needed or cluster.placement == "labels":  # labels: nodes may be added
        return
    beside = (
        f" (with the {cluster.num_finishers} view finisher(s) of cluster.ship=pixels beside it: ship views, or start nodes "
        f"of trainers with more CPUs)"
        if cluster.num_finishers
        else ""
    )
    raise ConfigError(
        f"{needed} trainer(s) are needed, and the cluster's nodes have room for {places}: each must find "
        f"{dict(needs)} on one node{beside}; lower cluster.cpus_per_trainer or cluster.num_trainers, or add larger nodes"
    )


def _num_nodes(total: Mapping[str, float]) -> int:
    """Return how many nodes there are: each has a resource of its own, named by its address."""
    return sum(name.startswith("node:") and not name.startswith("node:__") for name in total)


def lacks_a_label(config: RunConfig, total: Mapping[str, float]) -> bool:
    """Tell whether nodes of one label are there and none of the other: the others may be about to join."""
    there = [total.get(label, 0.0) > 0.0 for label in (VIEW_LABEL, TRAINER_LABEL)]
    return config.cluster.placement == "auto" and any(there) and not all(there)


def _uses_label(config: RunConfig, label: str, total: Mapping[str, float]) -> bool:
    placement = config.cluster.placement
    return placement == "labels" or (placement == "auto" and total.get(label, 0.0) > 0.0)


def _decide_device(config: RunConfig, gpus: float) -> str:
    cluster = config.cluster
    needed = cluster.min_trainers or cluster.num_trainers
    device = cluster.device
    if device == "auto" and cluster.placement == "labels":
        raise ConfigError(
            "cluster.placement=labels may wait for nodes that do not exist yet, so auto cannot tell what they will have; "
            "set cluster.device to cuda or cpu"
        )
    if device == "auto":
        device = "cuda" if gpus >= needed else "cpu"
    if device == "cuda" and gpus < needed and cluster.placement != "labels":
        raise ConfigError(f"cluster.device=cuda needs {needed} GPU(s), the cluster has {gpus:g}")
    if config.training.compile and device != "cuda":
        raise ConfigError("training.compile=True works on GPUs only, and this run is on CPUs; set it to False")
    return device


def _check_trainers(config: RunConfig, total: Mapping[str, float]) -> None:
    cluster = config.cluster
    needed, room = cluster.min_trainers or cluster.num_trainers, total.get(TRAINER_LABEL, 0.0)
    if cluster.placement == "auto" and room < needed:
        raise ConfigError(
            f"the run needs {needed} trainer(s), but the nodes labelled `{TRAINER_LABEL}` have room for {room:g}; lower "
            f"cluster.num_trainers, add nodes, or set cluster.placement=labels to wait for nodes that are to come"
        )


def _decide_gpu_share(config: RunConfig, gpus: float, gpus_of_workers: float) -> float:
    """Return the GPUs of one trainer: a device of its own, or its share of one that view workers use too."""
    cluster = config.cluster
    needed = cluster.min_trainers or cluster.num_trainers
    others = gpus_of_workers + (cluster.gpus_for_knn if config.tracking.knn_every_epochs else 0.0)
    share: float
    if cluster.gpus_per_trainer != "auto":
        share = cluster.gpus_per_trainer
    elif needed + others <= gpus or gpus < needed:  # fewer are there with placement=labels only: they are to come
        share = 1.0
    else:
        per_worker = cluster.gpus_per_dali_worker
        workers_beside_one = math.ceil(round(gpus_of_workers / per_worker) / gpus) if gpus_of_workers else 0
        share = round(1.0 - workers_beside_one * per_worker - (others - gpus_of_workers), 3)
    is_enough = cluster.gpus_per_trainer != "auto" or share >= _LEAST_TRAINER_SHARE
    if not (is_enough and needed * share + others <= gpus + 1e-6) and cluster.placement != "labels":
        raise ConfigError(
            f"the cluster has {gpus:g} GPU(s); view workers of renderer dali-gpu and the k-NN need {others:g} of them, which "
            f"leaves too little for {needed} trainer(s) of cluster.gpus_per_trainer={cluster.gpus_per_trainer}; lower that, "
            f"cluster.gpus_per_dali_worker or cluster.num_view_workers, or add GPUs"
        )
    if cluster.num_trainers > 1 and share <= 0.5:
        raise ConfigError(
            f"{cluster.num_trainers} trainers with {share:g} of a GPU each: two could land on one, which nccl refuses; "
            f"with several trainers cluster.gpus_per_trainer must be above 0.5"
        )
    return share


def _decide_num_view_workers(
    config: RunConfig, total: Mapping[str, float], free: Mapping[str, float], worker: Mapping[str, float]
) -> int:
    cluster, wanted = config.cluster, config.cluster.num_view_workers
    labelled = VIEW_LABEL in worker
    if cluster.placement == "labels" and wanted != "auto":
        return wanted  # nodes may be added for them (autoscaling)
    # auto takes what is free now; an explicit number is judged by what the cluster has.
    resources = free if wanted == "auto" else total
    cpus = resources.get("CPU", 0.0)
    left = cpus - cluster.num_trainers * cluster.cpus_with_finishers
    room = int(left / cluster.cpus_per_view_worker) if cluster.cpus_per_view_worker > 0 else MAX_AUTO_WORKERS
    if labelled:
        room = min(room, int(resources.get(VIEW_LABEL, 0.0)))
    if wanted == "auto" and "GPU" in worker:
        room = min(room, AUTO_DALI_WORKERS_PER_GPU * max(1, int(resources.get("GPU", 0.0))))
    if room < (1 if wanted == "auto" else wanted):
        labels = f" and {resources.get(VIEW_LABEL, 0.0):g} free `{VIEW_LABEL}`" if labelled else ""
        raise ConfigError(
            f"the cluster has {cpus:g} free CPUs{labels}; {cluster.num_trainers} trainer(s) of "
            f"{cluster.cpus_with_finishers:g} leave room for {max(room, 0)} view worker(s) of "
            f"{cluster.cpus_per_view_worker:g}, but cluster.num_view_workers={wanted}; ask for fewer, lower "
            f"cluster.cpus_per_view_worker or cluster.cpus_per_trainer, or add nodes"
        )
    return min(room, MAX_AUTO_WORKERS) if wanted == "auto" else wanted
