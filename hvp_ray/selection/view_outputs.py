"""Outputs of a method's networks for views, from which it scores candidates without another forward pass.

Legend: V global views, L local views, B images, Q rescued images.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from hvp_ray.selection.candidates import Reusable


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewOutputs:
    """Outputs for the views of B images, by name."""

    of_globals: dict[str, Shaped[Tensor, "views batch *rest"]]
    """Outputs for the global views."""
    of_locals: dict[str, Shaped[Tensor, "local_views batch *rest"]] = field(default_factory=dict)
    """Outputs for the local views."""
    kept: Reusable = field(default_factory=dict)
    """What `Method.encode` kept."""
    first_round: "FirstRound | None" = None
    """Outputs that a loss contrasts with, if these images are rescued; None: they are all images that are scored."""

    def of_all_views(self, name: str) -> Shaped[Tensor, "all_views batch *rest"]:
        """Return an output for the global, then the local views."""
        of_globals = self.of_globals[name]
        return torch.cat([of_globals, self.of_locals[name]]) if name in self.of_locals else of_globals

    def with_other_views(self, others: "ViewOutputs", images: Int64[Tensor, " rescued"]) -> "ViewOutputs":
        """Return the outputs for all views of the rescued images.

        Args:
            others: outputs for the other global views of these images.
            images: their indices, ascending.
        """
        return ViewOutputs(
            of_globals={
                name: torch.cat([of_views[:, images], others.of_globals[name]])
                for name, of_views in self.of_globals.items()
            },
            of_locals={name: of_views[:, images] for name, of_views in self.of_locals.items()},
            first_round=FirstRound(outputs=self, images=images),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstRound:
    """The first round of scoring with rescue."""

    outputs: ViewOutputs
    """Outputs for views 0 and 1 of all images, and for all of their local views."""
    images: Int64[Tensor, " rescued"]
    """Indices of the rescued images among all."""
