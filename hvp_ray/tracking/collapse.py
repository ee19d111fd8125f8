"""Watch over collapse, the first fear of every user of self-supervision; harder views raise the risk."""

import logging

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger(__name__)

COLLAPSED_STD = 0.1
"""Below this `collapse/embedding_std` a warning is given; 1 is the value of an isotropic distribution."""


def embedding_std(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return the standard deviation of the normalised embeddings over the batch, x sqrt(D).

    Source: SimSiam, section 4.1 (figure 2, middle): 1 / sqrt(D) is healthy, 0 is collapse.
    """
    normalised = F.normalize(embeddings.float(), dim=1)
    return normalised.std(dim=0).mean() * embeddings.shape[1] ** 0.5


def effective_rank(embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Return exp of the entropy of the normalised singular values of the centred embeddings (Roy, Vetterli 2007)."""
    centred = embeddings.float() - embeddings.float().mean(dim=0)
    singular = torch.linalg.svdvals(centred)
    shares = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum())


class CollapseWatch:
    """Warns once when the embeddings have collapsed, and again after they had recovered."""

    def __init__(self) -> None:
        self._warned = False

    def see(self, step: int, std: float) -> None:
        """Take note of `collapse/embedding_std` at a step."""
        if std < COLLAPSED_STD and not self._warned:
            logger.warning(
                "step %d: the embeddings have nearly collapsed (standard deviation x sqrt(D) = %.3f, healthy is 1): "
                "lower the learning rate, check the data for near-duplicates, or train on easier views "
                "(selection.every=2, a larger minimum of crop_scale)",
                step,
                std,
            )
            self._warned = True
        elif std > 2 * COLLAPSED_STD:
            self._warned = False
