"""The two choices that need no model, computed on the host from the plan and the addresses of a batch."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hvp_ray.randomness import Purpose, draw_words
from hvp_ray.records import ViewBatch
from hvp_ray.selection.candidates import num_pairs, pair_table
from hvp_ray.views.geometry import crop_iou


def pair_ious(batch: ViewBatch, device: torch.device) -> Float[Tensor, "batch pairs"]:
    """Return the overlap of the crops of every pair."""
    plan = batch.global_views.plan
    ious = crop_iou(plan.top, plan.left, plan.height, plan.width, pair_table(plan.num_views))
    return torch.from_numpy(np.ascontiguousarray(ious)).to(device)


def draw_random_pairs(batch: ViewBatch, seed: int, device: torch.device) -> Int64[Tensor, " batch"]:
    """Draw one pair per image; addressed by sample id and epoch like the views."""
    words = draw_words(
        seed=seed, purpose=Purpose.RANDOM_PAIR, sample_ids=batch.sample_ids, epoch=batch.epoch, num_words=1
    )[:, 0]
    pairs = (words % np.uint64(num_pairs(batch.global_views.plan.num_views))).astype(np.int64)
    return torch.from_numpy(pairs).to(device)
