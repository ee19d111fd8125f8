"""Projection and prediction heads."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def simsiam_projector(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> nn.Sequential:
    """MLP of `num_layers` layers; BatchNorm after each, the last without affine parameters.

    Source: SimSiam, section 2 (baseline settings) and appendix D (two layers for CIFAR); the hidden layers of
    facebookresearch/simsiam, builder.py, are as wide as its input.
    """
    layers: list[nn.Module] = []
    width = in_dim
    for _ in range(num_layers - 1):
        layers += [nn.Linear(width, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
        width = hidden_dim
    layers += [nn.Linear(width, out_dim, bias=False), nn.BatchNorm1d(out_dim, affine=False)]
    return nn.Sequential(*layers)


def simsiam_predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """Bottleneck MLP with BatchNorm on the hidden layer only. Source: SimSiam, section 2."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, dim),
    )


def simclr_projector(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """MLP of two layers, BatchNorm after both, ReLU between. Source: automl/hvp, branch simclr (2048-2048-128)."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=False),
        nn.BatchNorm1d(out_dim),
    )


class PrototypeHead(nn.Module):
    """DINO's head: MLP of three layers with GELU, a normalised bottleneck, and one logit per prototype.

    `forward` gives the bottleneck and `logits` the last layer, so that callers need not hold the logits of all views at
    once (65,536 prototypes are 256 KiB for each view of each image).

    Source: facebookresearch/dino vision_transformer.py, DINOHead without BatchNorm.
    """

    def __init__(
        self, in_dim: int, *, hidden_dim: int, bottleneck_dim: int, num_prototypes: int, norm_last_layer: bool
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(bottleneck_dim, num_prototypes, norm_last_layer=norm_last_layer)

    def forward(self, features: Float[Tensor, "*images dim"]) -> Float[Tensor, "*images bottleneck"]:
        """Return the bottleneck of unit length."""
        return F.normalize(self.mlp(features).float(), dim=-1)

    def logits(self, bottleneck: Float[Tensor, "*images bottleneck"]) -> Float[Tensor, "*images prototypes"]:
        """Return the cosine to each prototype, times its length; float32."""
        logits: Tensor = self.prototypes(bottleneck)
        return logits.float()

    def logits_by_view(
        self, bottleneck_VBD: Float[Tensor, "views batch bottleneck"]
    ) -> Iterator[Float[Tensor, "batch prototypes"]]:
        """Yield the logits of one view after the other; those of a few views at a time exist, never of all candidates."""
        numbers_per_view = bottleneck_VBD.shape[1] * self.prototypes.direction.shape[0]
        for chunk in bottleneck_VBD.split(max(1, LOGITS_AT_ONCE // numbers_per_view)):
            yield from self.logits(chunk)


LOGITS_AT_ONCE = 2**25
"""`PrototypeHead.logits_by_view` holds at most this many numbers (128 MiB), or one view."""


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have a direction and a length; the length is 1 and fixed, or trained."""

    def __init__(self, dim: int, num_prototypes: int, *, norm_last_layer: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(num_prototypes, dim))
        nn.init.kaiming_uniform_(self.direction, a=5**0.5)
        self.length = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=not norm_last_layer)

    def forward(self, inputs: Float[Tensor, "*images dim"]) -> Float[Tensor, "*images prototypes"]:
        """Return inputs @ (length * direction / |direction|)."""
        return F.linear(inputs, self.length * F.normalize(self.direction, dim=1))
