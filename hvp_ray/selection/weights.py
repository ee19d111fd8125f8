"""Weights of an image's pairs in its loss, from the pairs' own losses: hard pairs without another forward pass.

Rule all_pairs trains on every pair of the views. A weighting says how much each pair counts. To add one, write a function
of the losses to weights, give it a line in `WEIGHTINGS`, and list its name in `Weighting` (`config/selection.py`).

Weightings compute without gradient and copy nothing from the device to the host.

Legend: V views, B images, P pairs, M perfect matchings of the views.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.config import SelectionConfig, Weighting
from hvp_ray.selection.candidates import Candidates, pair_table


@dataclass(frozen=True, kw_only=True, slots=True)
class PairWeighting:
    """The weighting of a step. Call it with losses [B, P] to get weights [B, P], whose rows sum to 1."""

    weighting: Weighting
    temperature: float
    """In standard deviations of an image's losses."""
    top_k: int | None
    view_is_in_pair: Bool[Tensor, "views pairs"]
    """Whether a view is in a pair."""
    matchings: Int64[Tensor, "matchings half_of_views"] | None
    """Pairs of each perfect matching; see `matching_table`."""
    ramp_position: Float[Tensor, ""]
    """0: equal weights. 1: those of the weighting. Between: linear. A tensor, so that a new value compiles nothing anew."""

    @torch.no_grad()
    def __call__(self, losses_BP: Float[Tensor, "batch pairs"]) -> Float[Tensor, "batch pairs"]:
        """Return the weights of the pairs, without gradient."""
        losses_BP = losses_BP.detach()
        weights_BP = WEIGHTINGS[self.weighting](losses_BP, self)
        return torch.lerp(weigh_equally(losses_BP, self), weights_BP, self.ramp_position.to(losses_BP.dtype))


def weigh_equally(losses_BP: Float[Tensor, "batch pairs"], _: PairWeighting) -> Float[Tensor, "batch pairs"]:
    """Return 1 / P for each pair."""
    return torch.full_like(losses_BP, 1 / losses_BP.shape[1])


def weigh_by_softmax(losses_BP: Float[Tensor, "batch pairs"], given: PairWeighting) -> Float[Tensor, "batch pairs"]:
    """Return softmax(loss / (temperature * standard deviation of the image's losses)); equal weights for equal losses."""
    scale = losses_BP.std(dim=1, keepdim=True, correction=0) * given.temperature
    above = losses_BP - losses_BP.amax(dim=1, keepdim=True)  # exactly 0 if all are equal, whatever the scale
    return torch.softmax(above / scale.clamp_min(torch.finfo(losses_BP.dtype).tiny), dim=1)


def weigh_hardest_matching(
    losses_BP: Float[Tensor, "batch pairs"], given: PairWeighting
) -> Float[Tensor, "batch pairs"]:
    """Return equal weights for the pairs of the perfect matching with the largest loss; ties go to the first matching."""
    assert given.matchings is not None
    hardest = losses_BP[:, given.matchings].sum(dim=2).argmax(dim=1)
    return _mean_over_chosen(losses_BP, given.matchings[hardest])


def weigh_top_k(losses_BP: Float[Tensor, "batch pairs"], given: PairWeighting) -> Float[Tensor, "batch pairs"]:
    """Return equal weights for the k hardest pairs, and 0 for the others."""
    assert given.top_k is not None
    return _mean_over_chosen(losses_BP, losses_BP.topk(given.top_k, dim=1).indices)


def weigh_hardest_partners(
    losses_BP: Float[Tensor, "batch pairs"], given: PairWeighting
) -> Float[Tensor, "batch pairs"]:
    """Return weights by which each view counts its hardest pair; a pair that both of its views choose counts twice."""
    of_views_BVP = losses_BP[:, None].masked_fill(~given.view_is_in_pair, -torch.inf)
    return _mean_over_chosen(losses_BP, of_views_BVP.argmax(dim=2))


WEIGHTINGS: dict[Weighting, Callable[[Tensor, PairWeighting], Tensor]] = {
    "mean": weigh_equally,
    "softmax": weigh_by_softmax,
    "matching": weigh_hardest_matching,
    "top_k": weigh_top_k,
    "partner": weigh_hardest_partners,
}
"""Every value of `Weighting`; `SelectionConfig.weighting` explains each."""


def pair_weights_of(
    selection: SelectionConfig, candidates: Candidates, *, device: torch.device, ramp_position: float = 1.0
) -> PairWeighting | None:
    """Return the weighting of a step that trains on all pairs of these views; None: the plain mean over the pairs.

    Args:
        selection: weighting, temperature and k.
        candidates: the views that are trained on.
        device: device of the losses.
        ramp_position: 0 (plain mean) to 1 (the weighting in full).
    """
    pairs = candidates.pairs_on(device)
    if selection.weighting == "mean" or ramp_position == 0.0 or len(pairs) == 1:
        return None
    views = torch.arange(candidates.num_views, device=device)
    return PairWeighting(
        weighting=selection.weighting,
        temperature=selection.weight_temperature,
        top_k=selection.weight_top_k,
        view_is_in_pair=(pairs == views[:, None, None]).any(dim=2),
        matchings=_matchings_on(candidates, device) if selection.weighting == "matching" else None,
        ramp_position=torch.full((), ramp_position, device=device),
    )


def mean_of_pairs(
    values_BP: Float[Tensor, "batch pairs"], weights_BP: Float[Tensor, "batch pairs"] | None
) -> Float[Tensor, ""]:
    """Return the mean over the images of each image's weighted mean over its pairs; weights None: of its plain mean."""
    return values_BP.mean() if weights_BP is None else (weights_BP * values_BP).sum(dim=1).mean()


def effective_pairs(weights_BP: Float[Tensor, "batch pairs"]) -> Float[Tensor, ""]:
    """Return 1 / (sum of squared weights), mean over the images: P for equal weights, 1 if one pair has all the weight."""
    return (1.0 / weights_BP.square().sum(dim=1)).mean()


@functools.lru_cache(maxsize=16)
def matching_table(num_views: int, *, alternating: bool = False) -> NDArray[np.int64]:
    """Return the perfect matchings of the views, [M, V/2]: rows of `pair_table` that have every view once.

    There are (V-1)!! = (V-1)(V-3)... matchings, 105 for 8 views, and (V/2)! with `alternating`. Odd V: M = 0.
    """
    row_of = {frozenset(pair): row for row, pair in enumerate(pair_table(num_views, alternating=alternating).tolist())}

    def matchings(views: tuple[int, ...]) -> Iterator[list[int]]:
        if not views:
            yield []
            return
        first, *rest = views
        for other in rest:
            row = row_of.get(frozenset((first, other)))
            if row is not None:
                yield from ([row, *others] for others in matchings(tuple(view for view in rest if view != other)))

    return np.array(list(matchings(tuple(range(num_views)))), dtype=np.int64).reshape(-1, num_views // 2)


def _mean_over_chosen(
    losses_BP: Float[Tensor, "batch pairs"], pair_indices: Int64[Tensor, "batch chosen"]
) -> Float[Tensor, "batch pairs"]:
    """Return the weights of the mean over the chosen pairs; a pair that is chosen twice counts twice."""
    pairs = torch.arange(losses_BP.shape[1], device=losses_BP.device)
    return (pair_indices[:, :, None] == pairs).to(losses_BP.dtype).mean(dim=1)


def _matchings_on(candidates: Candidates, device: torch.device) -> Tensor:
    """Return the matchings on a device; a GPU keeps its copy."""
    if device.type == "cuda":
        return _kept_matchings(candidates, device)
    return torch.from_numpy(matching_table(candidates.num_views, alternating=candidates.alternating))


@functools.lru_cache(maxsize=16)
def _kept_matchings(candidates: Candidates, device: torch.device) -> Tensor:
    return torch.from_numpy(matching_table(candidates.num_views, alternating=candidates.alternating)).to(device)
