"""Figures at the end of a run: curves, candidate views scored with the final weights, and maps of a Vision Transformer."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.decode import decode_pixels
from hvp_ray.evaluation.features import load_some_pixels
from hvp_ray.evaluation.patch_maps import compute_patch_maps, has_patch_maps
from hvp_ray.local_cache import with_local_weights
from hvp_ray.records import BatchRequest, ViewBatch
from hvp_ray.selection import Candidates, CandidateScores, choose_views, hard_step, score_views
from hvp_ray.stream.device import CopyToDevice
from hvp_ray.stream.reading import read_images
from hvp_ray.stream.render_batch import build_render_context, render_batch
from hvp_ray.tracking.figures import DrawnChoice, draw_candidates, draw_curves
from hvp_ray.tracking.patch_figure import draw_patch_maps
from hvp_ray.tracking.run_log import METRICS, read_records
from hvp_ray.training.pixel_views import PixelViews
from hvp_ray.training.trainee import Trainee, build_untrained_method

_SCORED_IMAGES = 64
"""More than are drawn, because BatchNorm uses the batch's statistics and SimCLR its other images."""


def draw_figures(config: RunConfig, dataset: Dataset, trainee: Trainee, run_dir: Path) -> list[Path]:
    """Draw all figures of a run into its folder; return the files. One rank calls this."""
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    figures = draw_curves(folder, list(read_records(run_dir, METRICS)))
    path = folder / "candidate_views.png"
    _draw_candidate_views(config, dataset, trainee, path)
    if has_patch_maps(trainee.method.encoder, size_px=config.views.global_views.size_px):
        figures.append(folder / "attention.png")
        _draw_patch_maps(config, dataset, trainee, figures[-1])
    return [path, *figures]


def _draw_patch_maps(config: RunConfig, dataset: Dataset, trainee: Trainee, path: Path) -> None:
    pixels = load_some_pixels(dataset, config.views, config.data, count=config.tracking.num_figure_images)
    draw_patch_maps(
        path, pixels, compute_patch_maps(trainee.method.encoder, pixels, config.views, device=trainee.device)
    )


def _draw_candidate_views(config: RunConfig, dataset: Dataset, trainee: Trainee, path: Path) -> None:
    """Render candidates of some training images, score them with the final weights, and draw the choice."""
    hard = dataclasses.replace(config.selection.with_rule("hardest"), quantile=1.0, limit=None, rescue_share=1.0)
    candidates = hard_step(hard).candidates(config.views)
    batch = _render_some(config, dataset, candidates)
    scores = _score_alone(config, trainee, batch, candidates)
    choice = choose_views("hardest", candidates, num_images=len(batch.sample_ids), device=trainee.device, scores=scores)
    assert choice.pair_indices is not None
    count = min(config.tracking.num_figure_images, len(batch.sample_ids))
    rows = np.linspace(0, len(batch.sample_ids) - 1, count).astype(np.int64)
    draw_candidates(
        path,
        batch,
        [_decode(config, dataset, batch.sample_ids[row]) for row in rows],
        DrawnChoice(
            rows=rows,
            pairs=candidates.pairs,
            chosen=choice.pair_indices.cpu().numpy(),
            chosen_locals=None if choice.local_indices is None else choice.local_indices.cpu().numpy(),
            scores_BP=scores.best_of_pairs(candidates.num_chosen_local_views).float().cpu().numpy(),
        ),
    )


def _render_some(config: RunConfig, dataset: Dataset, candidates: Candidates) -> ViewBatch:
    count = min(len(dataset.training_ids), max(_SCORED_IMAGES, config.tracking.num_figure_images))
    spread = np.linspace(0, len(dataset.training_ids) - 1, count).astype(np.int64)
    request = BatchRequest(
        step=0,
        epoch=config.training.epochs,
        first_position=0,
        sample_ids=dataset.training_ids[spread],
        num_views=candidates.num_views,
        num_local_views=candidates.num_local_views,
    )
    return render_batch(build_render_context(config, dataset, "cpu"), request)


def _score_alone(config: RunConfig, trainee: Trainee, batch: ViewBatch, candidates: Candidates) -> CandidateScores:
    """Score with a copy of the method without other ranks, so that none has to take part."""
    method = build_untrained_method(with_local_weights(config)).to(trainee.device)
    method.load_state_dict(trainee.method.state_dict())
    device_batch = CopyToDevice(trainee.device)(batch)
    device_batch.wait()
    views = PixelViews.of(device_batch).normalised(config.views)
    torch.manual_seed(0)
    return score_views(method.train().score, views, candidates, module=method, batch_norm="batch")


def _decode(config: RunConfig, dataset: Dataset, sample_id: np.int64) -> NDArray[np.uint8]:
    image, data = read_images(dataset.source, [int(sample_id)]).images[0], config.data
    return decode_pixels(image, data)
