"""Placement: resolve a run's `auto` settings on a cluster, and refuse a run that the cluster cannot hold.

Ray resources label the nodes: `view` is the number of view workers that a node takes, `trainer` the number of trainers.
`ray start --resources '{"view": 4}'` sets them. On a cluster without labels every process may run on every node.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvp_ray.config import ClusterConfig, RunConfig
from hvp_ray.costs.prefetch import USABLE_STORE_FRACTION, batches_for_workers, batches_that_fit, prefetch_bytes
from hvp_ray.errors import ConfigError
from hvp_ray.resolved_run import Device, ResolvedRun, renderer_of
from hvp_ray.stream.machine import MAX_AUTO_WORKERS

VIEW_LABEL, TRAINER_LABEL = "view", "trainer"
AUTO_DALI_WORKERS_PER_GPU = 1
"""On an H100 a second worker beside a trainer gave no more images per second (docs/experiments/2026-11-26-h100.md)."""

_LEAST_TRAINER_SHARE = 0.1

Resources = Mapping[str, float]
"""Ray resource -> amount."""


class PrefetchError(ConfigError):
    """The prefetched batches do not fit the object stores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterState:
    """Resources of a Ray cluster at one moment."""

    total: Resources
    free: Resources
    """Resources that no process has reserved."""
    nodes: Sequence[Resources]
    """Resources of each node that is alive."""
    num_sharing: int = 1
    """Runs that share the cluster. Each gets an equal part."""

    @property
    def part(self) -> tuple[Resources, Resources]:
        """Total and free resources of one run. Reservations of other runs do not affect the part of this run."""
        if self.num_sharing == 1:
            return self.total, self.free
        part = {name: amount / self.num_sharing for name, amount in self.total.items()}
        return part, part


def resolve_on_cluster(config: RunConfig, state: ClusterState, bytes_per_step: int) -> ResolvedRun:
    """Decide device, renderer, number of view workers, reservations and prefetch of a run.

    Args:
        config: the run.
        state: the cluster.
        bytes_per_step: see `costs.prefetch.step_bytes`.

    Raises:
        PrefetchError: the prefetched batches do not fit its object stores.
        ConfigError: the cluster has too little else. The message has the numbers.
    """
    cluster, (total, free) = config.cluster, state.part
    gpus = total.get("GPU", 0.0)
    device = resolve_device(cluster, gpus)
    if config.training.compile and device != "cuda":
        raise ConfigError("training.compile=True works on GPUs only, and this run is on CPUs; set it to False")
    renderer = renderer_of(cluster)
    if renderer == "dali-gpu" and gpus == 0 and cluster.placement != "labels":
        raise ConfigError("cluster.renderer=dali-gpu, but no node of the cluster has a GPU; choose cpu or dali-cpu")
    trainer = {"CPU": cluster.cpus_with_finishers}
    worker = {"CPU": cluster.cpus_per_view_worker}
    if renderer == "dali-gpu":
        worker["GPU"] = cluster.gpus_per_dali_worker
    if _uses_label(cluster, TRAINER_LABEL, total):
        trainer[TRAINER_LABEL] = 1.0
    if _uses_label(cluster, VIEW_LABEL, total):
        worker[VIEW_LABEL] = 1.0
    _check_trainer_label(cluster, total)
    num_view_workers = _decide_num_view_workers(cluster, free if cluster.num_view_workers == "auto" else total, worker)
    if device == "cuda":
        of_knn = cluster.gpus_for_knn if config.tracking.knn_every_epochs else 0.0
        trainer["GPU"] = _decide_gpu_share(cluster, gpus, num_view_workers * worker.get("GPU", 0.0), of_knn)
    _check_trainers_fit(cluster, state, trainer)
    store_bytes = store_for_prefetch(cluster, state.nodes, trainer, worker) / state.num_sharing
    return ResolvedRun(
        renderer=renderer,
        device=device,
        num_view_workers=num_view_workers,
        batches_in_flight=decide_batches_in_flight(cluster, num_view_workers, store_bytes, bytes_per_step),
        trainer_resources=trainer,
        view_worker_resources=worker,
    )


def resolve_device(cluster: ClusterConfig, gpus: float) -> Device:
    """Return what trainers run on, in a cluster with this many GPUs.

    Raises:
        ConfigError: there are too few GPUs, or `auto` cannot know how many there will be.
    """
    needed = cluster.min_trainers or cluster.num_trainers
    if cluster.device == "auto":
        if cluster.placement == "labels":
            raise ConfigError(
                "cluster.placement=labels may wait for nodes that do not exist yet, so auto cannot tell what they will have; "
                "set cluster.device to cuda or cpu"
            )
        return "cuda" if gpus >= needed else "cpu"
    if cluster.device == "cuda" and gpus < needed and cluster.placement != "labels":
        raise ConfigError(f"cluster.device=cuda needs {needed} GPU(s), the cluster has {gpus:g}")
    return cluster.device


def room_for(node: Resources, needed: Resources) -> int:
    """Return how many processes with these reservations fit a node."""
    return min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needed.items() if amount > 0.0), default=1)


def room_for_view_workers(
    total: Resources, free: Resources, view_worker: Resources, *, num_workers: int, most: int
) -> int:
    """Return how many more view workers a node has room for.

    Args:
        total: resources of the node.
        free: those that no process has reserved.
        view_worker: reservations of a view worker.
        num_workers: view workers of this run that the node has.
        most: upper bound if they reserve nothing. Such a node gets 64 at most.
    """
    if not any(view_worker.values()):
        return max(0, min(most, MAX_AUTO_WORKERS - num_workers))
    room = room_for(free, view_worker)
    if "GPU" in view_worker:
        room = min(room, AUTO_DALI_WORKERS_PER_GPU * int(total.get("GPU", 0.0)) - num_workers)
    return max(0, room)


def view_workers_of_part(cluster: ClusterConfig, state: ClusterState, view_worker: Resources) -> int:
    """Return how many view workers the equal part of one run holds, of the runs that share the cluster."""
    try:
        return _decide_num_view_workers(cluster, state.part[0], view_worker)
    except ConfigError:
        return 0


def lacks_a_label(cluster: ClusterConfig, total: Resources) -> bool:
    """Return whether nodes of only one label are there. Nodes of the other label may be about to join."""
    there = [total.get(label, 0.0) > 0.0 for label in (VIEW_LABEL, TRAINER_LABEL)]
    return cluster.placement == "auto" and any(there) and not all(there)


def decide_batches_in_flight(
    cluster: ClusterConfig, num_view_workers: int, store_bytes: float, bytes_per_step: int
) -> int:
    """Return how many batches each trainer prefetches. `auto` keeps all view workers busy if the object stores allow it.

    Raises:
        PrefetchError: the batches would spill.
    """
    fits = batches_that_fit(store_bytes, bytes_per_step)
    wanted = min(batches_for_workers(cluster, num_view_workers), fits)
    batches = max(1, wanted) if cluster.batches_in_flight == "auto" else cluster.batches_in_flight
    needed = prefetch_bytes(batches, bytes_per_step)
    if needed <= USABLE_STORE_FRACTION * store_bytes:
        return batches
    advice = f"set cluster.batches_in_flight={fits}" if fits >= 1 else "use fewer images per step or smaller views"
    raise PrefetchError(
        f"prefetching needs {needed / 2**20:.0f} MiB of the object store (cluster.batches_in_flight={batches} batches and "
        f"one in use, {bytes_per_step / cluster.num_trainers / 2**20:.1f} MiB each, {cluster.num_trainers} trainer(s)), but "
        f"of its {store_bytes / 2**20:.0f} MiB only {USABLE_STORE_FRACTION:.0%} can be used without spilling to disk; "
        f"{advice}, or give Ray a larger object store (cluster.object_store_mib for a local Ray, `ray start "
        f"--object-store-memory` otherwise)"
    )


def store_for_prefetch(
    cluster: ClusterConfig,
    nodes: Sequence[Resources],
    trainer: Resources,
    view_worker: Resources,
    *,
    view_nodes: Sequence[Resources] = (),
) -> float:
    """Return the bytes of object store that the prefetched batches of all trainers can use.

    A batch is stored on the node that rendered it and copied to the node of its trainer. So the nodes of view workers
    must hold all batches together. A node of trainers must hold those of as many trainers as it takes.

    Args:
        cluster: the run's settings.
        nodes: all nodes that are alive.
        trainer: reservations of a trainer.
        view_worker: reservations of a view worker.
        view_nodes: nodes that have view workers. Empty: they may be placed on every node with room.
    """
    of_views = [_store_of(node) for node in view_nodes or nodes if view_nodes or room_for(node, view_worker) >= 1]
    counts = {index: min(room_for(node, trainer), cluster.num_trainers) for index, node in enumerate(nodes)}
    of_trainers = [
        _store_of(nodes[index]) / count * cluster.num_trainers for index, count in counts.items() if count >= 1
    ]
    # Nodes that will join are unknown. If no node fits yet, all present stores count.
    return min([*of_trainers, sum(of_views or map(_store_of, nodes))])


def _store_of(node: Resources) -> float:
    return node.get("object_store_memory", 0.0)


def _check_trainers_fit(cluster: ClusterConfig, state: ClusterState, trainer: Resources) -> None:
    """Check that each trainer fits on a single node. Ray would silently queue one that does not."""
    needed = (cluster.min_trainers or cluster.num_trainers) * state.num_sharing
    places = sum(room_for(node, trainer) for node in state.nodes)
    if places >= needed or cluster.placement == "labels":  # labels: nodes may be added
        return
    beside = (
        f" (with the {cluster.num_finishers} view finisher(s) of cluster.ship=pixels beside it: ship views, or start nodes "
        f"of trainers with more CPUs)"
        if cluster.num_finishers
        else ""
    )
    raise ConfigError(
        f"{needed} trainer(s) are needed, and the cluster's nodes have room for {places}: each needs "
        f"{dict(trainer)} on one node{beside}; lower cluster.cpus_per_trainer or cluster.num_trainers, or add larger nodes"
    )


def _uses_label(cluster: ClusterConfig, label: str, total: Resources) -> bool:
    return cluster.placement == "labels" or (cluster.placement == "auto" and total.get(label, 0.0) > 0.0)


def _check_trainer_label(cluster: ClusterConfig, total: Resources) -> None:
    """Check that labels leave room for the trainers, and that elastic training has labels on several nodes."""
    needed, room = cluster.min_trainers or cluster.num_trainers, total.get(TRAINER_LABEL, 0.0)
    if not _uses_label(cluster, TRAINER_LABEL, total):
        num_nodes = sum(name.startswith("node:") and not name.startswith("node:__") for name in total)
        if cluster.min_trainers is not None and num_nodes > 1:
            raise ConfigError(
                f"cluster.min_trainers={cluster.min_trainers} on a cluster of several nodes needs nodes labelled "
                f"`{TRAINER_LABEL}` (ray start --resources '{{\"{TRAINER_LABEL}\": 1}}'): without them Ray "
                f"counts CPUs that view workers use as free, and waits for trainers that never fit"
            )
    elif cluster.placement == "auto" and room < needed:
        raise ConfigError(
            f"the run needs {needed} trainer(s), but the nodes labelled `{TRAINER_LABEL}` have room for {room:g}; lower "
            f"cluster.num_trainers, add nodes, or set cluster.placement=labels to wait for nodes that will join"
        )


def _decide_gpu_share(cluster: ClusterConfig, gpus: float, of_workers: float, of_knn: float) -> float:
    """Return the GPUs of one trainer: a whole device, or its share of a device that view workers use too."""
    needed, others = cluster.min_trainers or cluster.num_trainers, of_workers + of_knn
    least = 0.0
    share: float
    if cluster.gpus_per_trainer != "auto":
        share = cluster.gpus_per_trainer
    elif needed + others <= gpus or gpus < needed:  # too few only if nodes will join
        share = 1.0
    else:
        per_worker = cluster.gpus_per_dali_worker
        workers_beside_one = math.ceil(round(of_workers / per_worker) / gpus) if of_workers else 0
        share, least = round(1.0 - workers_beside_one * per_worker - of_knn, 3), _LEAST_TRAINER_SHARE
    if (share < least or needed * share + others > gpus + 1e-6) and cluster.placement != "labels":
        raise ConfigError(
            f"the cluster has {gpus:g} GPU(s); view workers of renderer dali-gpu and the k-NN need {others:g} of them, which "
            f"leaves too little for {needed} trainer(s) of cluster.gpus_per_trainer={cluster.gpus_per_trainer}; lower that, "
            f"cluster.gpus_per_dali_worker or cluster.num_view_workers, or add GPUs"
        )
    if cluster.num_trainers > 1 and share <= 0.5:
        raise ConfigError(
            f"{cluster.num_trainers} trainers with {share:g} of a GPU each: two could share one GPU, which nccl refuses; "
            f"with several trainers cluster.gpus_per_trainer must be above 0.5"
        )
    return share


def _decide_num_view_workers(cluster: ClusterConfig, resources: Resources, worker: Resources) -> int:
    """Return the number of view workers that the resources hold: free ones for `auto`, all for a number."""
    wanted, per_worker = cluster.num_view_workers, cluster.cpus_per_view_worker
    if cluster.placement == "labels" and wanted != "auto":
        return wanted  # nodes may be added for them (autoscaling)
    cpus = resources.get("CPU", 0.0)
    left = cpus - cluster.num_trainers * cluster.cpus_with_finishers
    room = int(left / per_worker) if per_worker > 0 else MAX_AUTO_WORKERS if wanted == "auto" else wanted
    if VIEW_LABEL in worker:
        room = min(room, int(resources.get(VIEW_LABEL, 0.0)))
    if wanted == "auto" and "GPU" in worker:
        room = min(room, AUTO_DALI_WORKERS_PER_GPU * max(1, int(resources.get("GPU", 0.0))))
    if room < (1 if wanted == "auto" else wanted):
        labels = f" and {resources.get(VIEW_LABEL, 0.0):g} free `{VIEW_LABEL}`" if VIEW_LABEL in worker else ""
        raise ConfigError(
            f"the cluster has {cpus:g} free CPUs{labels}; {cluster.num_trainers} trainer(s) of "
            f"{cluster.cpus_with_finishers:g} leave room for {max(room, 0)} view worker(s) of "
            f"{per_worker:g}, but cluster.num_view_workers={wanted}; ask for fewer, lower "
            f"cluster.cpus_per_view_worker or cluster.cpus_per_trainer, or add nodes"
        )
    return min(room, cluster.max_view_workers) if wanted == "auto" else wanted
