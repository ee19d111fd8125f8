"""The candidates: which views an image may be trained on, and how hard a method finds them.

A candidate is a pair of global views and, with multi-crop, a set of k local views. All losses of this package are
additive in the views, so a method scores each pair, and what each local view adds to it. The P * C(L, k) candidates
(51,480 for DINO's 4 + 16 views) are never listed.

Legend: V global views, L local views, B images, P pairs, k local views trained on.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.errors import ShapeError
from hvp_ray.row_reuse import Kept


def num_pairs(num_views: int) -> int:
    """Return P = V(V-1)/2."""
    return num_views * (num_views - 1) // 2


def pair_table(num_views: int, *, alternating: bool = False) -> NDArray[np.int64]:
    """Return the view indices of every pair, [P, 2].

    These are all unordered pairs in lexicographic order: (0,1), (0,2), ..., (1,2), ... With `alternating` they are all
    (even view, odd view): (0,1), (0,3), ..., (2,1), ... Then both slots keep the transform that they have in the vanilla arm.

    Raises:
        ShapeError: fewer than two views.
    """
    if num_views < 2:
        raise ShapeError(f"{num_views=}: a pair needs two views")
    views = range(num_views)
    pairs = list(itertools.product(views[::2], views[1::2]) if alternating else itertools.combinations(views, 2))
    return np.array(pairs, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The views that an image may be trained on."""

    num_views: int
    """Global views."""

    num_local_views: int = 0
    """Local views."""

    num_chosen_local_views: int = 0
    """Local views that are trained on."""

    alternating: bool = False
    """Pairs are (even view, odd view) only; see `pair_table`."""

    limit: int | None = None
    """Rules that read scores compare only this many randomly drawn candidates. None: all of them, exactly."""

    rescue_share: float = 1.0
    """Share of the images that has all candidates: those whose pair 0 is easiest. The others have those of pair 0 only."""

    def __post_init__(self) -> None:
        if self.num_views < 2:
            raise ShapeError(f"num_views={self.num_views}: a pair needs two views")
        if not 0 <= self.num_chosen_local_views <= self.num_local_views:
            raise ShapeError(
                f"num_chosen_local_views={self.num_chosen_local_views} must be from 0 to "
                f"num_local_views={self.num_local_views}"
            )

    @property
    def pairs(self) -> NDArray[np.int64]:
        """[P, 2]."""
        return pair_table(self.num_views, alternating=self.alternating)

    def pairs_on(self, device: torch.device) -> Int64[Tensor, "pairs 2"]:
        """Return `pairs` on a device; a GPU keeps its copy."""
        return pair_table_on(self.num_views, device, alternating=self.alternating)

    def num_rescued(self, num_images: int) -> int:
        """Return how many images that are scored together have all candidates."""
        return round(self.rescue_share * num_images)

    @property
    def count(self) -> int:
        """P * C(L, k)."""
        return len(self.pairs) * math.comb(self.num_local_views, self.num_chosen_local_views)


def pair_table_on(num_views: int, device: torch.device, *, alternating: bool) -> Int64[Tensor, "pairs 2"]:
    """Return `pair_table` on a device. Compiled steps take it as a constant, which they do not make again."""
    if device.type == "cuda":
        return _kept_pairs(num_views, device, alternating=alternating)
    # Nothing is kept on a CPU: a step on tensors without content would leave such a tensor to real steps.
    return torch.from_numpy(pair_table(num_views, alternating=alternating))


@functools.lru_cache(maxsize=64)
def _kept_pairs(num_views: int, device: torch.device, *, alternating: bool) -> Tensor:
    return torch.from_numpy(pair_table(num_views, alternating=alternating)).to(device)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptViews:
    """What the backward of an encoder's outputs needs, kept for all views of one size; see `hvp_ray.row_reuse`."""

    kept: Kept
    """Of the rows (view, image), in this order."""
    num_images: int
    are_local: bool

    def gather(self, view_indices: Int64[Tensor, "slots batch"]) -> Float[Tensor, "slots batch *rest"]:
        """Return the outputs of the chosen views, differentiable; once, because it frees what the others kept."""
        rows_SB = view_indices * self.num_images + torch.arange(self.num_images, device=view_indices.device)
        return self.kept.rows(rows_SB.flatten()).unflatten(0, view_indices.shape)


Reusable = dict[str, Float[Tensor, "views batch *rest"] | KeptViews]
"""Results of scoring by name: those of each global view without gradient, or kept ones of an encoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateScores:
    """Hardness of every candidate: the loss that it would give.

    The score of (pair p, local views l_1 .. l_k) is pairs_BP[p] + locals_BPL[p, l_1] + ... + locals_BPL[p, l_k].
    """

    pairs_BP: Float[Tensor, "batch pairs"]  # noqa: N815 (shape letters)
    """Columns as `Candidates.pairs`; -inf: not scored (`Candidates.rescue_share`)."""

    locals_BPL: Float[Tensor, "batch pairs locals"] | None = None  # noqa: N815
    """Addition of each local view; None: there are no local views."""

    reusable: Reusable = field(default_factory=dict)
    """Results that training on some of the views can reuse."""

    @staticmethod
    def joined(parts: "Sequence[CandidateScores]") -> "CandidateScores":
        """Return the scores of all images from those of parts of a batch, in order."""
        if len(parts) == 1:
            return parts[0]
        of_locals = [part.locals_BPL for part in parts if part.locals_BPL is not None]
        reusable: Reusable = {}
        for name in parts[0].reusable:
            of_parts = [part.reusable[name] for part in parts]
            reusable[name] = torch.cat([values for values in of_parts if isinstance(values, Tensor)], dim=1)
        return CandidateScores(
            pairs_BP=torch.cat([part.pairs_BP for part in parts]),
            locals_BPL=torch.cat(of_locals) if of_locals else None,
            reusable=reusable,
        )

    def cloned(self) -> "CandidateScores":
        """Return a copy in memory of its own."""
        return CandidateScores(
            pairs_BP=self.pairs_BP.clone(),
            locals_BPL=None if self.locals_BPL is None else self.locals_BPL.clone(),
            reusable={
                name: values.clone() if isinstance(values, Tensor) else values for name, values in self.reusable.items()
            },
        )

    def mean(self, num_chosen_local_views: int) -> Float[Tensor, " batch"]:
        """Return the mean over the scored candidates of each image: the expected loss of a random one of them."""
        pairs, is_scored = self.pairs_BP, self.is_scored_BP
        if self.locals_BPL is not None:
            pairs = pairs + num_chosen_local_views * self.locals_BPL.mean(dim=2)
        return pairs.where(is_scored, 0.0).sum(dim=1) / is_scored.sum(dim=1)

    @property
    def is_scored_BP(self) -> Bool[Tensor, "batch pairs"]:  # noqa: N802 (shape letters)
        """Whether a pair was scored."""
        return self.pairs_BP != -torch.inf

    def with_all_locals(self) -> Float[Tensor, "batch pairs"]:
        """Return for each pair the score of its candidate with all local views."""
        return self.pairs_BP if self.locals_BPL is None else self.pairs_BP + self.locals_BPL.sum(dim=2)

    def best_of_pairs(self, num_chosen_local_views: int) -> Float[Tensor, "batch pairs"]:
        """Return for each pair the score of its hardest candidate."""
        if self.locals_BPL is None:
            return self.pairs_BP
        return self.pairs_BP + self.locals_BPL.topk(num_chosen_local_views, dim=2).values.sum(dim=2)
