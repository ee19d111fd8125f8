"""The content of `summary.json`: what training measured, and the k-NN accuracies of the encoder."""

import resource
import statistics
from typing import Any

import numpy as np
import torch

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.evaluation.report import evaluate_encoder, evaluate_pixels, load_knn_data
from hvp_ray.runs.after_training import AfterTraining
from hvp_ray.runs.checkpoint import weights_digest
from hvp_ray.runs.initial_run import build_method_at_start
from hvp_ray.runs.opened_rank import OpenedRank, RestoredRank
from hvp_ray.runs.versions import versions_by_step
from hvp_ray.stream.quarantine import CRASHES_DECODER
from hvp_ray.tracking.run_log import ATTEMPTS, METRICS, read_records
from hvp_ray.tracking.unreadable_log import unreadable_images
from hvp_ray.training.loop import LoopResult
from hvp_ray.training.trainee import Trainee


def summarize(rank: OpenedRank, restored: RestoredRank, result: LoopResult) -> dict[str, Any]:
    """Return what training measured; speeds are of this attempt."""
    job, config, trainee, stats = rank.job, rank.job.config, restored.trainee, restored.stream.stats
    steps_here = len(result.step_seconds)
    images_here = steps_here * config.training.images_per_step
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if trainee.device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(trainee.device)
    return {
        "run_name": job.run_name,
        "recipe": config.recipe,
        "method": config.method.name,
        "selection_rule": config.selection.rule,
        "seed": config.run.seed,
        "num_steps": result.num_steps_done,
        "num_epochs": result.num_steps_done / restored.steps.steps_per_epoch,
        "images_seen": result.num_steps_done * config.training.images_per_step,
        "num_training_images": len(rank.dataset.training_ids),
        "data": None if job.inventory is None else job.inventory.to_dict(),
        "train_seconds": result.train_seconds,
        "images_per_second": images_here / result.train_seconds if steps_here else 0.0,
        "first_batch_seconds": stats.first_batch_seconds,
        "data_wait_fraction": stats.wait_seconds / result.train_seconds if steps_here else 0.0,
        "step_seconds_median": statistics.median(result.step_seconds) if steps_here else 0.0,
        "peak_memory_bytes": peak_bytes,
        "view_bytes": stats.num_bytes,
        "num_batches_repeated": stats.num_retries,
        **_summarize_log(rank),
        "weights_digest": weights_digest(trainee.method.state_dict()),
        "run_identity": job.run_identity,
        "renderer": job.resolved.renderer,
        "device": trainee.device.type,
        "num_trainers": config.cluster.num_trainers,
    }


def _summarize_log(rank: OpenedRank) -> dict[str, Any]:
    run_dir = rank.job.run_dir
    metrics = [record["metrics"] for record in read_records(run_dir, METRICS)]
    attempts = list(read_records(run_dir, ATTEMPTS, dropped=True))
    reasons = unreadable_images(run_dir).values()

    def mean_of(name: str) -> float | None:
        values = [recorded[name] for recorded in metrics if name in recorded]
        return float(np.mean(values)) if values else None

    return {
        "num_resumes": len(attempts) - 1,
        "other_versions": versions_by_step(attempts),
        "loss_first": metrics[0]["train/loss"] if metrics else None,
        "loss_last": metrics[-1]["train/loss"] if metrics else None,
        "chosen_iou_mean": mean_of("selection/chosen_iou"),
        "other_iou_mean": mean_of("selection/other_iou"),
        "num_unreadable_images": len(reasons),
        "num_quarantined_images": sum(reason == CRASHES_DECODER for reason in reasons),
    }


def knn_results(config: RunConfig, dataset: Dataset, trainee: Trainee, after: AfterTraining) -> dict[str, float | None]:
    """Evaluate the trained encoder, the untrained one and raw pixels, and count the images; None: no labels, or it failed."""
    device = trainee.device
    suffixes = ("", "_untrained", "_pixels")
    results: dict[str, float | None] = dict.fromkeys(
        [
            *(f"{kind}{suffix}" for kind in ("knn_top1", "knn5shot_top1") for suffix in suffixes),
            "num_knn_training_images",
            "num_knn_test_images",
        ]
    )
    if not config.tracking.knn_images:
        return results
    knn_data = after.attempt("reading the images of the k-NN", lambda: load_knn_data(config, dataset))
    if knn_data is None:
        return results
    num_images = {"num_knn_training_images": len(knn_data.bank), "num_knn_test_images": len(knn_data.queries)}

    def trained() -> dict[str, float]:
        return evaluate_encoder(trainee.method.encoder, knn_data, config, device)

    def untrained() -> dict[str, float]:
        return evaluate_encoder(build_method_at_start(config).encoder.to(device), knn_data, config, device)

    found = {
        "": after.attempt("k-NN of the trained encoder", trained),
        "_untrained": after.attempt("k-NN of the untrained encoder", untrained),
        "_pixels": after.attempt("k-NN of raw pixels", lambda: evaluate_pixels(knn_data, config)),
    }
    for suffix, result in found.items():
        if result is not None:
            results |= {f"knn_top1{suffix}": result["top1"], f"knn5shot_top1{suffix}": result["5shot"]}
    return results | num_images
