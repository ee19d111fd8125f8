"""KoLeo, a regulariser that spreads the features of a batch (Sablayrolles et al., ICLR 2019; DINOv2, Oquab et al., 2023).

Legend: V views, B images of this rank, N images of all ranks, D features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hvp_ray.methods.method import in_float32

_EPSILON = 1e-8


@in_float32
def nearest_neighbour_losses(
    features_VBD: Float[Tensor, "views batch dim"], *, gather: Callable[[Tensor], Tensor], rank: int
) -> Float[Tensor, "batch views"]:
    """Return -log distance of each normalised feature to its nearest neighbour, in the same view of other images.

    Zeros if there is one image. Source: facebookresearch/dinov2 loss/koleo_loss.py. Differs: neighbours are searched on all
    ranks, so that the loss of a step does not depend on the number of ranks.

    Args:
        features_VBD: of any length.
        gather: `Ranks.gather`, differentiable.
        rank: index of this rank.
    """
    precise = features_VBD.to(torch.promote_types(features_VBD.dtype, torch.float32))
    own = F.normalize(precise, dim=-1, eps=_EPSILON)
    everyone = gather(own).movedim(0, 1).flatten(1, 2)  # [V, N, D]
    if everyone.shape[1] == 1:
        return own.new_zeros(own.shape[1], own.shape[0])
    with torch.no_grad():
        similarities = own @ everyone.mT
        places = torch.arange(own.shape[1], device=own.device)
        similarities[:, places, rank * own.shape[1] + places] = -2.0
        nearest = similarities.argmax(dim=2)
    neighbours = everyone.gather(1, nearest[..., None].expand(-1, -1, everyone.shape[2]))
    distances = torch.linalg.vector_norm(own - neighbours + _EPSILON, dim=-1)
    return -(distances + _EPSILON).log().T
