"""The choices that need no model, computed on the host from the plan and the addresses of a batch."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.config import RunConfig
from hvp_ray.host_to_device import to_device
from hvp_ray.randomness import Purpose, draw_stream, draw_words
from hvp_ray.records import ViewBatch
from hvp_ray.selection import Candidates, DrawnCandidates
from hvp_ray.views.geometry import crop_iou


def candidates_of(config: RunConfig, step: int) -> Candidates:
    """Return what can be chosen in a step."""
    return Candidates(
        num_views=config.selection.num_views_at(step),
        num_local_views=config.selection.num_local_views_at(step),
        num_chosen_local_views=config.selection.num_chosen_local_views or 0,
        alternating=config.views.slots_keep_transforms,
    )


def pair_ious(batch: ViewBatch, candidates: Candidates, device: torch.device) -> Float[Tensor, "batch pairs"]:
    """Return the overlap of the crops of every pair of global views."""
    plan = batch.global_views.plan
    ious = crop_iou(plan.top, plan.left, plan.height, plan.width, candidates.pairs)
    return to_device(ious, device)


def draw_random_pairs(
    batch: ViewBatch, candidates: Candidates, seed: int, device: torch.device
) -> Int64[Tensor, " batch"]:
    """Draw one pair per image; addressed by sample id and epoch like the views."""
    words = draw_words(
        seed=seed, purpose=Purpose.RANDOM_PAIR, sample_ids=batch.sample_ids, epoch=batch.epoch, num_words=1
    )[:, 0]
    pairs = (words % np.uint64(len(candidates.pairs))).astype(np.int64)
    return to_device(pairs, device)


def draw_random_locals(
    batch: ViewBatch, candidates: Candidates, seed: int, device: torch.device
) -> Int64[Tensor, "chosen_locals batch"]:
    """Draw k local views per image, ascending; addressed by sample id and epoch like the views."""
    words = draw_words(
        seed=seed,
        purpose=Purpose.RANDOM_LOCALS,
        sample_ids=batch.sample_ids,
        epoch=batch.epoch,
        num_words=candidates.num_local_views,
    )
    chosen = _smallest(words, candidates.num_chosen_local_views)
    return to_device(chosen.T, device)


def draw_candidates(
    candidates: Candidates, limit: int | None, *, seed: int, step: int, rank: int
) -> DrawnCandidates | None:
    """Draw `limit` candidates, with replacement, for all images of a rank's step; None: all are compared.

    Source: automl/hvp, branch dino, pretrain.py:49-76. Differs: addressed by (seed, step, rank), where the reference takes
    Python's unseeded generator; and no fewer than all where `limit` reaches their number.
    """
    if limit is None or limit >= candidates.count:
        return None
    words_each = 1 + candidates.num_local_views
    words = draw_stream(
        seed=seed, purpose=Purpose.CANDIDATES, index=rank, epoch=step, num_words=limit * words_each
    ).reshape(limit, words_each)
    return DrawnCandidates(
        pair_indices=(words[:, 0] % np.uint64(len(candidates.pairs))).astype(np.int64),
        local_indices=_smallest(words[:, 1:], candidates.num_chosen_local_views),
    )


def _smallest(words: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` smallest words of each row, ascending: a uniform subset."""
    return np.sort(np.argsort(words, axis=1, kind="stable")[:, :count], axis=1).astype(np.int64)
