"""Nearest neighbours of some test images, by the encoder before and after training."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.source import Source
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.runs.initial_run import build_method_at_start
from hvp_ray.tracking.neighbour_figure import Neighbours, draw_neighbours
from hvp_ray.training.trainee import Trainee

_MAX_QUERIES = 8
_NUM_NEIGHBOURS = 5
_MAX_BANK_IMAGES = 1_000


def draw_nearest_neighbours(config: RunConfig, dataset: Dataset, trainee: Trainee, path: Path) -> None:
    """Draw the nearest training images of some test images. Without test images, the queries are training images.

    Args:
        config: the run.
        dataset: its images; labels are not used.
        trainee: has the trained encoder.
        path: PNG to write.

    Raises:
        DataError: the storage failed repeatedly.
    """
    bank_ids = _spread(dataset.training_ids, _MAX_BANK_IMAGES + _MAX_QUERIES)
    query_ids, query_source = _spread(dataset.test_ids, _MAX_QUERIES), dataset.test_source
    if not len(query_ids):
        query_ids, query_source = _spread(bank_ids, min(_MAX_QUERIES, len(bank_ids) // 2)), dataset.source
        bank_ids = np.setdiff1d(bank_ids, query_ids)
    if not len(query_ids):
        return  # a single image has no neighbour
    queries, query_ids = load_evaluation_pixels(query_source, query_ids, config.views, config.data)
    bank, bank_ids = load_evaluation_pixels(dataset.source, bank_ids, config.views, config.data)
    encoders = {
        "nearest before training": build_method_at_start(config).encoder.to(trainee.device),
        "nearest after training": trainee.method.encoder,
    }
    bank_names = [_file_of(dataset.source, sample_id) for sample_id in bank_ids.tolist()]
    columns = [
        find_neighbours(title, encoder, queries, bank, bank_names, config, trainee.device)
        for title, encoder in encoders.items()
    ]
    draw_neighbours(path, queries, [_file_of(query_source, sample_id) for sample_id in query_ids.tolist()], columns)


def find_neighbours(
    title: str,
    encoder: nn.Module,
    queries: NDArray[np.uint8],
    bank: NDArray[np.uint8],
    bank_names: list[str],
    config: RunConfig,
    device: torch.device,
) -> Neighbours:
    """Return the bank images whose features have the largest cosine similarity to each query.

    Args:
        title: of the column.
        encoder: gives the features.
        queries: [N, S, S, C].
        bank: [M, S, S, C].
        bank_names: M names.
        config: mean and standard deviation of the channels.
        device: device of the encoder.
    """
    of_queries, of_bank = (
        F.normalize(extract_features(encoder, pixels, config.views, device=device), dim=1) for pixels in (queries, bank)
    )
    nearest = (of_queries @ of_bank.T).topk(min(_NUM_NEIGHBOURS, len(bank)), dim=1)
    indices = nearest.indices.cpu().numpy()
    return Neighbours(
        title=title,
        images=bank[indices],
        names=[[bank_names[index] for index in row] for row in indices.tolist()],
        similarities=nearest.values.cpu().numpy(),
    )


def _file_of(source: Source, sample_id: int) -> str:
    """Return the name of an image's file without folders, with the row or member if it holds several images."""
    return source.describe(sample_id).rsplit("/", 1)[-1]


def _spread(sample_ids: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Return at most `limit` ids, evenly spaced."""
    return sample_ids[np.linspace(0, len(sample_ids) - 1, min(limit, len(sample_ids))).astype(np.int64)]
