"""Sinkhorn-Knopp centring of a teacher's outputs (SwAV, Caron et al., NeurIPS 2020; DINOv2, Oquab et al., 2023).

Instead of subtracting a moving mean, the batch itself is balanced: every prototype gets the same mass.

Legend: N samples of this rank, K prototypes.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hvp_ray.methods.method import in_float32


@torch.no_grad()
@in_float32
def balanced_probabilities(
    logits_NK: Float[Tensor, "samples prototypes"],
    temperature: Tensor,
    *,
    gather: Callable[[Tensor], Tensor],
    counts_N: Bool[Tensor, " samples"] | None = None,
    iterations: int = 3,
) -> Float[Tensor, "samples prototypes"]:
    """Return the teacher's probabilities: rows sum to 1, and all prototypes have nearly the same sum over all ranks.

    Source: facebookresearch/dinov2 loss/dino_clstoken_loss.py and ibot_patch_loss.py, sinkhorn_knopp_teacher. Differs: the
    largest logit of all ranks is subtracted first, which cancels and keeps the exponentials finite.

    Args:
        logits_NK: the teacher's.
        temperature: divides them.
        gather: `Ranks.gather`; every rank calls this function equally often.
        counts_N: mask of the samples to balance; the others get zeros. None: all are balanced.
        iterations: alternations between prototypes and samples. The last one is over samples.
    """

    def over_ranks(values: Tensor) -> Tensor:
        return gather(values).sum(dim=0)

    scaled = logits_NK.to(torch.promote_types(logits_NK.dtype, torch.float32)) / temperature
    mass = torch.exp(scaled - gather(scaled.amax()).amax())
    number = mass.new_tensor(float(len(mass)))
    if counts_N is not None:
        mass, number = mass * counts_N[:, None], counts_N.sum().to(mass.dtype)
    number = over_ranks(number)
    least = torch.finfo(mass.dtype).tiny
    mass = mass / over_ranks(mass.sum()).clamp_min(least)
    for _ in range(iterations):
        mass = mass / (over_ranks(mass.sum(dim=0)) * mass.shape[1]).clamp_min(least)
        mass = mass / (mass.sum(dim=1, keepdim=True) * number).clamp_min(least)
    return mass * number
