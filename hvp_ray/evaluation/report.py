"""Evaluate an encoder, or raw pixels as a baseline, by k-NN on the images of a run."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.labels import match_labels
from hvp_ray.errors import LabelError
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.evaluation.knn import few_shot_knn_accuracy, knn_accuracy
from hvp_ray.randomness import Purpose, draw_stream, permutation_from_words

logger = logging.getLogger(__name__)

SHOTS = 5
_IMAGES_AT_ONCE = 256
PIXEL_BASELINE_PX = 32
"""Largest image size of the raw-pixel baseline. As floats, 20,000 images of 224 px would take 12 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnData:
    """Labelled evaluation images."""

    bank: NDArray[np.uint8]
    """[N, S, S, C], centre crops of training images."""
    bank_labels: NDArray[np.int64]
    queries: NDArray[np.uint8]
    """[M, S, S, C], centre crops of test images."""
    query_labels: NDArray[np.int64]


def load_knn_data(config: RunConfig, dataset: Dataset) -> KnnData | None:
    """Load bank and queries, at most `tracking.knn_images` each; None if there are no usable labels or images.

    `check_knn_labels` reports the reason before training.

    Raises:
        DataError: see `match_labels`.
    """
    try:
        labels = match_labels(dataset)
    except LabelError:
        return None
    bank_ids = _choose(labels.training_ids, config.tracking.knn_images)
    query_ids = _choose(labels.test_ids, config.tracking.knn_images)
    bank, bank_ids = load_evaluation_pixels(dataset.source, bank_ids, config.views, config.data)
    queries, query_ids = load_evaluation_pixels(dataset.test_source, query_ids, config.views, config.data)
    if not len(bank_ids) or not len(query_ids):
        logger.warning("no k-NN: none of its %s images is readable", "test" if len(bank_ids) else "training")
        return None
    return KnnData(
        bank=bank,
        bank_labels=labels.of_training[bank_ids],
        queries=queries,
        query_labels=labels.of_test[query_ids],
    )


def check_knn_labels(config: RunConfig, dataset: Dataset) -> list[str]:
    """Return remarks for the user, a sentence each, about the labels that the k-NN will use.

    Raises:
        DataError: training and test images have labels that cannot be matched.
    """
    if not config.tracking.knn_images:
        return []
    try:
        return list(match_labels(dataset).remarks)
    except LabelError as error:
        held_out = len(dataset.test_ids) if dataset.test_source is dataset.source else 0
        advice = f". {held_out:,} images stay held out; to train on them, set data.test_fraction=0" if held_out else ""
        return [f"no k-NN evaluation of this run: {error}. Training starts without labels{advice}"]


def _choose(sample_ids: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Return at most `limit` ids, a fixed pseudo-random choice."""
    words = draw_stream(seed=0, purpose=Purpose.SUBSET, index=1, epoch=0, num_words=len(sample_ids))
    return np.sort(sample_ids[permutation_from_words(words)[:limit]])


def evaluate_encoder(
    backbone: nn.Module, knn_data: KnnData, config: RunConfig, device: torch.device
) -> dict[str, float]:
    """Return top1 and 5shot, the k-NN accuracies of an encoder's features."""
    bank = extract_features(backbone, knn_data.bank, config.views, device=device)
    queries = extract_features(backbone, knn_data.queries, config.views, device=device)
    return _both(bank, queries, knn_data, config)


def evaluate_pixels(knn_data: KnnData, config: RunConfig) -> dict[str, float]:
    """Return the metrics of `evaluate_encoder` for raw pixels, at most `PIXEL_BASELINE_PX` wide: the baseline of features."""
    return _both(_small_pixels(knn_data.bank), _small_pixels(knn_data.queries), knn_data, config)


def title_of_pixels(size_px: int) -> str:
    """Return the name of the raw-pixel baseline for images of this size."""
    return "raw pixels" if size_px <= PIXEL_BASELINE_PX else f"raw pixels ({PIXEL_BASELINE_PX} px)"


def _small_pixels(images: NDArray[np.uint8]) -> Float[Tensor, "images values"]:
    """Return the values of each image as one row; scale images above `PIXEL_BASELINE_PX` down."""
    size_px = min(images.shape[1], PIXEL_BASELINE_PX)
    rows = torch.empty(len(images), size_px * size_px * images.shape[-1])
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        chunk = torch.from_numpy(images[start : start + _IMAGES_AT_ONCE])
        if size_px < images.shape[1]:
            channels_first = chunk.permute(0, 3, 1, 2)
            small = F.interpolate(channels_first, size=size_px, mode="bilinear", antialias=True)
            chunk = small.permute(0, 2, 3, 1)
        rows[start : start + len(chunk)] = chunk.flatten(1)
    return rows


def _both(
    bank: Float[Tensor, "bank dim"], queries: Float[Tensor, "queries dim"], knn_data: KnnData, config: RunConfig
) -> dict[str, float]:
    bank_labels = torch.from_numpy(knn_data.bank_labels).to(bank.device)
    query_labels = torch.from_numpy(knn_data.query_labels).to(bank.device)
    neighbours = config.tracking.knn_neighbours
    return {
        "top1": knn_accuracy(bank, bank_labels, queries, query_labels, neighbours=neighbours),
        "5shot": few_shot_knn_accuracy(bank, bank_labels, queries, query_labels, shots=SHOTS),
    }
