"""Choose one candidate per image, and gather its views. Pure tensors; no gradient; no copy from device to host.

Legend: V global views, L local views, B images, P pairs, k local views trained on, S slots (2: the pair; V with rule
all_pairs), R candidates of a limited search, C channels, H, W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.config import Rule
from hvp_ray.errors import ShapeError
from hvp_ray.host_to_device import to_device
from hvp_ray.selection.candidates import Candidates, CandidateScores


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What is trained on."""

    pair_indices: Int64[Tensor, " batch"] | None
    """Row of `Candidates.pairs` chosen for each image; None with all_pairs."""
    view_indices: Int64[Tensor, "slots batch"]
    """Global views trained on."""
    local_indices: Int64[Tensor, "chosen_locals batch"] | None = None
    """Local views trained on, ascending; None: there are none."""
    scores: Float[Tensor, " batch"] | None = None
    """Score of the chosen candidate; None: the rule does not look at scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnCandidates:
    """Candidates of a limited search: the same ones for all images of a rank's step."""

    pair_indices: NDArray[np.int64]
    """[R], row of `Candidates.pairs`."""
    local_indices: NDArray[np.int64]
    """[R, k], ascending."""


def choose_views(
    rule: Rule,
    candidates: Candidates,
    *,
    num_images: int,
    device: torch.device,
    scores: CandidateScores | None = None,
    drawn: DrawnCandidates | None = None,
    iou_BP: Float[Tensor, "batch pairs"] | None = None,
    random_pairs: Int64[Tensor, " batch"] | None = None,
    random_locals: Int64[Tensor, "chosen_locals batch"] | None = None,
) -> Selection:
    """Choose the views to train on by `rule`; ties go to the lowest pair.

    Args:
        rule: see `hvp_ray.config.Rule`. first and min_iou take the first k local views.
        candidates: what can be chosen.
        num_images: B.
        device: where the indices shall lie.
        scores: loss that each candidate would give, higher is harder; needed by hardest and easiest.
        drawn: hardest and easiest compare these candidates only; None: all of them, exactly.
        iou_BP: overlap of the crops of each pair; needed by min_iou.
        random_pairs: pair drawn for each image; needed by random.
        random_locals: local views drawn for each image; needed by random with local views.

    Raises:
        ShapeError: what the rule needs is missing or has another shape.
    """
    num_locals, chosen_locals = candidates.num_local_views, candidates.num_chosen_local_views
    if rule == "all_pairs":
        views = _same_for_all(candidates.num_views, num_images, device)
        every_local = _same_for_all(num_locals, num_images, device) if num_locals else None
        return Selection(pair_indices=None, view_indices=views, local_indices=every_local)
    chosen_scores = None
    local_indices = _same_for_all(chosen_locals, num_images, device) if chosen_locals else None
    match rule:
        case "hardest" | "easiest":
            scored = _check_scores(scores, candidates, num_images)
            sign = 1.0 if rule == "hardest" else -1.0
            if drawn is not None:
                chosen, local_indices, chosen_scores = _best_of_drawn(scored, drawn, sign)
            else:
                chosen, local_indices, chosen_scores = _best_of_all(scored, chosen_locals, sign)
        case "min_iou":
            chosen = _check_pairs(iou_BP, "iou_BP", candidates, num_images).argmin(dim=1)
        case "random":
            if random_pairs is None or random_pairs.shape != (num_images,):
                raise ShapeError(f"random_pairs must have shape [{num_images}], got {random_pairs!r}")
            chosen = random_pairs
            if chosen_locals:
                if random_locals is None or random_locals.shape != (chosen_locals, num_images):
                    raise ShapeError(
                        f"random_locals must have shape [{chosen_locals}, {num_images}], got {random_locals!r}"
                    )
                local_indices = random_locals.to(device)
        case "first":
            chosen = torch.zeros(num_images, dtype=torch.int64, device=device)
    table = candidates.pairs_on(device)
    chosen = chosen.to(device)
    return Selection(
        pair_indices=chosen,
        view_indices=table[chosen].T.contiguous(),
        local_indices=local_indices,
        scores=chosen_scores,
    )


def _best_of_all(
    scores: CandidateScores, chosen_locals: int, sign: float
) -> tuple[Int64[Tensor, " batch"], Int64[Tensor, "chosen_locals batch"] | None, Float[Tensor, " batch"]]:
    """Return the exact best candidate: for each pair the k best local views, then the best pair."""
    pairs_BP = sign * scores.pairs_BP
    if scores.locals_BPL is None or chosen_locals == 0:
        best, chosen = _lowest_argmax(pairs_BP)
        return chosen, None, sign * best
    top = (sign * scores.locals_BPL).topk(chosen_locals, dim=2)
    best, chosen = _lowest_argmax(pairs_BP + top.values.sum(dim=2))
    of_chosen = chosen[:, None, None].expand(-1, 1, chosen_locals)
    local_indices = top.indices.gather(1, of_chosen)[:, 0].sort(dim=1).values
    return chosen, local_indices.T.contiguous(), sign * best


def _best_of_drawn(
    scores: CandidateScores, drawn: DrawnCandidates, sign: float
) -> tuple[Int64[Tensor, " batch"], Int64[Tensor, "chosen_locals batch"] | None, Float[Tensor, " batch"]]:
    device = scores.pairs_BP.device
    pair_R = to_device(drawn.pair_indices, device)
    totals_BR = sign * scores.pairs_BP[:, pair_R]
    local_Rk = None
    if scores.locals_BPL is not None and drawn.local_indices.shape[1]:
        local_Rk = to_device(drawn.local_indices, device)
        totals_BR = totals_BR + sign * scores.locals_BPL[:, pair_R[:, None], local_Rk].sum(dim=2)
    best, at = _lowest_argmax(totals_BR)
    return pair_R[at], None if local_Rk is None else local_Rk[at].T.contiguous(), sign * best


def _lowest_argmax(values_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return (maximum, its lowest index) of each row."""
    at = values_BN.argmax(dim=1)
    return values_BN.gather(1, at[:, None])[:, 0], at


def _same_for_all(count: int, num_images: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)[:, None].expand(count, num_images).contiguous()


def _check_scores(scores: CandidateScores | None, candidates: Candidates, num_images: int) -> CandidateScores:
    pairs_BP = _check_pairs(None if scores is None else scores.pairs_BP, "pairs_BP", candidates, num_images)
    assert scores is not None
    expected = (*pairs_BP.shape, candidates.num_local_views)
    found = None if scores.locals_BPL is None else tuple(scores.locals_BPL.shape)
    if candidates.num_local_views and found != expected:
        raise ShapeError(f"locals_BPL must have shape [B, P, L] = {expected}, got {found}")
    return scores


def _check_pairs(values_BP: Tensor | None, name: str, candidates: Candidates, num_images: int) -> Tensor:
    expected = (num_images, len(candidates.pairs))
    if values_BP is None or tuple(values_BP.shape) != expected:
        found = None if values_BP is None else tuple(values_BP.shape)
        raise ShapeError(f"{name} must have shape [B, P] = {expected}, got {found}")
    return values_BP


def gather_views(
    of_views: Shaped[Tensor, "views batch *rest"], view_indices: Int64[Tensor, "slots batch"]
) -> Shaped[Tensor, "slots batch *rest"]:
    """Gather what belongs to the chosen views (pixels, masks) by one index: out[s, b] = of_views[view_indices[s, b], b]."""
    batch = torch.arange(of_views.shape[1], device=of_views.device)
    return of_views[view_indices, batch]
