"""The outcome of a selection rule, and gathering what belongs to the chosen views by index.

Legend: B images, S slots (2: the pair; V with rule all_pairs), k local views trained on.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from hvp_ray.selection.candidates import KeptViews, Reusable


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The views that each image is trained on."""

    pair_indices: Int64[Tensor, " batch"] | None
    """Row of `Candidates.pairs` chosen for each image; None: all pairs are trained on."""
    view_indices: Int64[Tensor, "slots batch"]
    """Global views trained on."""
    local_indices: Int64[Tensor, "chosen_locals batch"] | None = None
    """Local views trained on, ascending; None: there are none."""
    scores: Float[Tensor, " batch"] | None = None
    """Score of the chosen candidate; None: the rule does not read scores."""


def gather_views(
    of_views: Shaped[Tensor, "views batch *rest"], view_indices: Int64[Tensor, "slots batch"]
) -> Shaped[Tensor, "slots batch *rest"]:
    """Gather what belongs to the chosen views (pixels, masks) by one index: out[s, b] = of_views[view_indices[s, b], b]."""
    batch = torch.arange(of_views.shape[1], device=of_views.device)
    return of_views[view_indices, batch]


def gather_reusable(reusable: Reusable, selection: Selection) -> dict[str, Float[Tensor, "slots batch *rest"]]:
    """Gather what training on the chosen views reuses of scoring; see `CandidateScores.reusable`."""
    chosen = {}
    for name, of_views in reusable.items():
        if not isinstance(of_views, KeptViews):
            chosen[name] = gather_views(of_views, selection.view_indices)
        elif not of_views.are_local:
            chosen[name] = of_views.gather(selection.view_indices)
        elif selection.local_indices is not None:
            chosen[name] = of_views.gather(selection.local_indices)
    return chosen
