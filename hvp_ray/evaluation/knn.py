"""Classify frozen features by k-NN: the protocol of Wu et al. (CVPR 2018) that the HVP authors use.

Legend: N bank images, M query images, D features, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.randomness import Purpose, draw_stream, permutation_from_words

TEMPERATURE = 0.07
_SIMILARITIES_AT_ONCE = 2**26
"""256 MiB in float32: 1,024 queries against a bank of up to 65,536 images."""
FEW_SHOT_DRAWS = 20
"""Number of fixed draws of labelled images; few-label results average over them."""


def knn_correct(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int64[Tensor, " bank"],
    queries: Float[Tensor, "queries dim"],
    query_labels: Int64[Tensor, " queries"],
    *,
    neighbours: int,
    are_normalised: bool = False,
) -> Bool[Tensor, " queries"]:
    """Tell for each query whether it is classified correctly, by votes weighted with exp(cosine similarity / 0.07).

    `neighbours` is limited to the size of the bank. Normalised features are not copied.
    """
    if not are_normalised:
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    neighbours = min(neighbours, len(bank))
    rows = max(1, min(1024, _SIMILARITIES_AT_ONCE // len(bank)))
    parts = []
    for chunk, labels in zip(queries.split(rows), query_labels.split(rows), strict=True):
        similarities, indices = (chunk @ bank.T).topk(neighbours, dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device, dtype=chunk.dtype)
        votes.scatter_add_(1, bank_labels[indices], (similarities / TEMPERATURE).exp())
        parts.append(votes.argmax(dim=1) == labels)
    return torch.cat(parts)


def knn_accuracy(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int64[Tensor, " bank"],
    queries: Float[Tensor, "queries dim"],
    query_labels: Int64[Tensor, " queries"],
    *,
    neighbours: int,
) -> float:
    """Return top-1 accuracy in [0, 1] of `knn_correct`."""
    correct = knn_correct(bank, bank_labels, queries, query_labels, neighbours=neighbours)
    return int(correct.sum()) / len(queries)


def few_shot_knn_accuracy(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int64[Tensor, " bank"],
    queries: Float[Tensor, "queries dim"],
    query_labels: Int64[Tensor, " queries"],
    *,
    shots: int,
) -> float:
    """Return the mean accuracy over `FEW_SHOT_DRAWS` fixed draws of `shots` labelled images per class.

    `neighbours` equals `shots`: with few labels a larger k would let other classes outvote. Classes with fewer than `shots`
    images contribute all of them.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    accuracies = []
    for draw in range(FEW_SHOT_DRAWS):
        rows = torch.from_numpy(draw_shots(bank_labels.cpu().numpy(), shots, draw)).to(bank.device)
        correct = knn_correct(
            bank[rows], bank_labels[rows], queries, query_labels, neighbours=shots, are_normalised=True
        )
        accuracies.append(int(correct.sum()) / len(queries))
    return float(np.mean(accuracies))


def draw_shots(labels: NDArray[np.int64], shots: int, draw: int) -> NDArray[np.int64]:
    """Return the rows, ascending, of the images in fixed draw number `draw`: `shots` per class, or all of a smaller class."""
    words = draw_stream(seed=0, purpose=Purpose.PROBE, index=draw, epoch=0, num_words=len(labels))
    shuffled = permutation_from_words(words)
    rows = [shuffled[labels[shuffled] == label][:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))
