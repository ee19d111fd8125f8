"""What a self-supervised method is to the training step.

A method is an `nn.Module` whose `forward` is the training loss on the chosen views, so that DDP, compilation and
autocast wrap it from outside, and whose `score` tells how hard each pair of views is.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from hvp_ray.config import MethodConfig, SimSiamConfig
from hvp_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodLoss:
    """What one training forward gives."""

    loss: Float[Tensor, ""]
    """Mean over the images of this rank; differentiable."""
    embeddings: Float[Tensor, "batch dim"]
    """Embeddings of one view of each image, detached; watched for collapse."""


@runtime_checkable
class Method(Protocol):
    """A module with these members; see the module's text."""

    backbone: nn.Module

    def score(self, views_VB: Float[Tensor, "views batch channels height width"]) -> Float[Tensor, "batch pairs"]:
        """Return the loss that each pair of views would give, higher is harder, columns as `pair_table`."""
        ...

    def forward(self, slots: Float[Tensor, "slots batch channels height width"]) -> MethodLoss:
        """Return the training loss on the chosen views."""
        ...

    def constant_rate_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that may keep the initial learning rate."""
        ...


def build_method(config: MethodConfig) -> nn.Module:
    """Build the method that a config describes; the result satisfies `Method`."""
    match config:
        case SimSiamConfig():
            from hvp_ray.methods.simsiam import SimSiam

            return SimSiam(config)
    raise ConfigError(f"no method for {type(config).__name__}")
