"""The k-NN at the end of a run: trained encoder against untrained encoder and raw pixels."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.source import UNLABELLED, Source
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.evaluation.knn import few_shot_knn_accuracy, knn_accuracy
from hvp_ray.randomness import Purpose, draw_stream, permutation_from_words

SHOTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnData:
    """Labelled evaluation images."""

    bank: NDArray[np.uint8]
    """[N, S, S, 3], centre crops of training images."""
    bank_labels: NDArray[np.int64]
    queries: NDArray[np.uint8]
    """[M, S, S, 3], centre crops of test images."""
    query_labels: NDArray[np.int64]


def load_knn_data(config: RunConfig, dataset: Dataset) -> KnnData | None:
    """Load bank and queries, at most `tracking.knn_images` each; None: no labels, or no test images."""
    limit = config.tracking.knn_images
    bank_ids = _labelled(dataset.source, dataset.training_ids, limit)
    query_ids = _labelled(dataset.test_source, dataset.test_ids, limit)
    if not len(bank_ids) or not len(query_ids):
        return None
    load = partial(
        load_evaluation_pixels,
        views=config.views,
        max_image_pixels=config.data.max_image_pixels,
        intensity_range=config.data.intensity_range,
    )
    bank, bank_ids = load(dataset.source, bank_ids)
    queries, query_ids = load(dataset.test_source, query_ids)
    if not len(bank_ids) or not len(query_ids):
        return None
    return KnnData(
        bank=bank,
        bank_labels=dataset.source.load_labels()[bank_ids],
        queries=queries,
        query_labels=dataset.test_source.load_labels()[query_ids],
    )


def _labelled(source: Source, sample_ids: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Return at most `limit` labelled ids: a fixed pseudo-random choice."""
    if not source.has_labels:
        return sample_ids[:0]
    labelled = sample_ids[source.load_labels()[sample_ids] != UNLABELLED]
    words = draw_stream(seed=0, purpose=Purpose.SUBSET, index=1, epoch=0, num_words=len(labelled))
    return np.sort(labelled[permutation_from_words(words)[:limit]])


def evaluate_encoder(
    backbone: nn.Module, knn_data: KnnData, config: RunConfig, device: torch.device
) -> dict[str, float]:
    """Return knn_top1 and knn5shot_top1 of an encoder's features."""
    bank = extract_features(backbone, knn_data.bank, config.views, device=device)
    queries = extract_features(backbone, knn_data.queries, config.views, device=device)
    return _both(bank, queries, knn_data, config)


def evaluate_pixels(knn_data: KnnData, config: RunConfig) -> dict[str, float]:
    """Return the same of raw pixels: what a feature must beat."""
    bank = torch.from_numpy(knn_data.bank).flatten(1).float()
    queries = torch.from_numpy(knn_data.queries).flatten(1).float()
    return _both(bank, queries, knn_data, config)


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
