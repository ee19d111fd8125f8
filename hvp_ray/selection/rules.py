"""The selection rules: each one is a function that chooses the views of every image of a step.

To add a rule, write a function from `RuleInput` to `Selection`, give it a line in `RULES`, and list its name in
`Rule` (`config/selection.py`). A rule may read scores, the plan and addressed random numbers. Anything further that a rule
needs becomes a field of `RuleInput`, which `training/step.py` fills. To compare pairs, read `CandidateScores.best_of_pairs`,
which includes local views; `pairs_BP` does not.

Rules compute without gradient and copy nothing from the device to the host.

Legend: V global views, L local views, B images, P pairs, k local views trained on, R candidates of a limited search.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_ray.config import Rule
from hvp_ray.errors import ShapeError
from hvp_ray.host_to_device import to_device
from hvp_ray.randomness import Purpose
from hvp_ray.records import ViewPlan
from hvp_ray.selection.candidates import Candidates, CandidateScores
from hvp_ray.selection.chosen import Selection
from hvp_ray.selection.draw import Draw, indices_from_words, subsets_from_words
from hvp_ray.views.geometry import crop_iou


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleInput:
    """Inputs of a rule: facts about the images of one rank's step."""

    candidates: Candidates
    num_images: int
    """B."""
    device: torch.device
    """Device of the returned indices."""
    quantile: float = 1.0
    """Place of the wanted candidate among those of an image in the order of their score, for `choose_hardest`: 1 is the
    hardest and 0 the easiest."""
    scores: CandidateScores | None = None
    """Loss that each candidate would give; higher is harder."""
    plan: ViewPlan | None = None
    """Plan of the V global views."""
    draw: Draw | None = None

    def required_scores(self) -> CandidateScores:
        """Return the scores.

        Raises:
            ShapeError: they are missing or have another shape.
        """
        pairs_BP = None if self.scores is None else self.scores.pairs_BP
        expected = (self.num_images, len(self.candidates.pairs))
        if self.scores is None or pairs_BP is None or tuple(pairs_BP.shape) != expected:
            found = None if pairs_BP is None else tuple(pairs_BP.shape)
            raise ShapeError(f"pairs_BP must have shape [B, P] = {expected}, got {found}")
        locals_BPL = self.scores.locals_BPL
        expected_locals = (*expected, self.candidates.num_local_views)
        found = None if locals_BPL is None else tuple(locals_BPL.shape)
        if self.candidates.num_local_views and found != expected_locals:
            raise ShapeError(f"locals_BPL must have shape [B, P, L] = {expected_locals}, got {found}")
        return self.scores

    def required_plan(self) -> ViewPlan:
        """Return the plan, or raise a ShapeError if it is missing or of other views."""
        expected = (self.candidates.num_views, self.num_images)
        found = None if self.plan is None else self.plan.top.shape
        if self.plan is None or found != expected:
            raise ShapeError(f"the rule needs a plan of [V, B] = {expected} views, got {found}")
        return self.plan

    def required_draw(self) -> Draw:
        """Return the draw, or raise a ShapeError if it is missing or of other images."""
        found = None if self.draw is None else len(self.draw.sample_ids)
        if self.draw is None or found != self.num_images:
            raise ShapeError(f"the rule needs the draw of B = {self.num_images} images, got {found}")
        return self.draw

    def select(
        self, pair_indices: Tensor, *, local_indices: Tensor | None = None, scores: Tensor | None = None
    ) -> Selection:
        """Return the selection of one pair per image; without `local_indices`, the first k local views."""
        chosen_locals = self.candidates.num_chosen_local_views
        if local_indices is None and chosen_locals:
            local_indices = self.same_for_all(chosen_locals)
        return Selection(
            pair_indices=pair_indices,
            view_indices=self.candidates.pairs_on(self.device)[pair_indices].T.contiguous(),
            local_indices=local_indices,
            scores=scores,
        )

    def same_for_all(self, count: int) -> Tensor:
        """Return the indices 0 .. count-1 for every image, [count, B]."""
        return torch.arange(count, device=self.device)[:, None].expand(count, self.num_images).contiguous()


def choose_hardest(given: RuleInput) -> Selection:
    """Choose the candidate with the largest loss (HVP), or the one at `RuleInput.quantile`; ties go to the lowest pair."""
    return _choose_by_score(given, sign=1.0, quantile=given.quantile)


def choose_easiest(given: RuleInput) -> Selection:
    """Choose the candidate with the smallest loss; ties go to the lowest pair."""
    return _choose_by_score(given, sign=-1.0)


def choose_first(given: RuleInput) -> Selection:
    """Choose views 0 and 1: the vanilla arm."""
    return given.select(torch.zeros(given.num_images, dtype=torch.int64, device=given.device))


def choose_random(given: RuleInput) -> Selection:
    """Choose a random pair and random local views, drawn for each image."""
    candidates, draw = given.candidates, given.required_draw()
    pairs = indices_from_words(draw.words_of_images(Purpose.RANDOM_PAIR, 1)[:, 0], len(candidates.pairs))
    local_indices = None
    if candidates.num_chosen_local_views:
        words = draw.words_of_images(Purpose.RANDOM_LOCALS, candidates.num_local_views)
        local_indices = to_device(subsets_from_words(words, candidates.num_chosen_local_views).T, given.device)
    return given.select(to_device(pairs, given.device), local_indices=local_indices)


def choose_min_iou(given: RuleInput) -> Selection:
    """Choose the pair whose crops overlap least; ties go to the lowest pair."""
    plan = given.required_plan()
    ious_BP = crop_iou(plan.top, plan.left, plan.height, plan.width, given.candidates.pairs)
    return given.select(to_device(ious_BP.argmin(axis=1), given.device))


def choose_all_pairs(given: RuleInput) -> Selection:
    """Choose every view, so that the loss is the mean over all pairs."""
    num_locals = given.candidates.num_local_views
    return Selection(
        pair_indices=None,
        view_indices=given.same_for_all(given.candidates.num_views),
        local_indices=given.same_for_all(num_locals) if num_locals else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionRule:
    """A rule, and its demands on a step."""

    choose: Callable[[RuleInput], Selection]
    needs_scores: bool = False
    """The rule reads scores, so its steps forward all candidates first."""
    trains_on_all_views: bool = False
    """Steps train on every view that is rendered, and not on one candidate per image."""
    chooses_before_rendering: bool = False
    """View workers render only what is trained on; see `proposals.py`."""

    def num_trained_views(self, candidates: Candidates) -> tuple[int, int]:
        """Return how many global and how many local views of each image a step trains on."""
        if self.trains_on_all_views:
            return candidates.num_views, candidates.num_local_views
        return 2, candidates.num_chosen_local_views


RULES: dict[Rule, SelectionRule] = {
    "hardest": SelectionRule(choose=choose_hardest, needs_scores=True),
    "easiest": SelectionRule(choose=choose_easiest, needs_scores=True),
    "first": SelectionRule(choose=choose_first),
    "random": SelectionRule(choose=choose_random),
    "min_iou": SelectionRule(choose=choose_min_iou),
    "all_pairs": SelectionRule(choose=choose_all_pairs, trains_on_all_views=True),
    "predicted": SelectionRule(choose=choose_first, chooses_before_rendering=True),
}
"""Every value of `Rule`; `SelectionConfig.rule` explains each."""


def choose_views(
    rule: Rule,
    candidates: Candidates,
    *,
    num_images: int,
    device: torch.device,
    quantile: float = 1.0,
    scores: CandidateScores | None = None,
    plan: ViewPlan | None = None,
    draw: Draw | None = None,
) -> Selection:
    """Choose the views that each image is trained on; for the arguments, see `RuleInput`.

    Raises:
        ShapeError: an input of the rule is missing or has another shape.
    """
    return RULES[rule].choose(
        RuleInput(
            candidates=candidates,
            num_images=num_images,
            device=device,
            quantile=quantile,
            scores=scores,
            plan=plan,
            draw=draw,
        )
    )


def _choose_by_score(given: RuleInput, sign: float, quantile: float = 1.0) -> Selection:
    limit = given.candidates.limit
    if limit is None or limit >= given.candidates.count:
        return _search_all(given, sign, quantile)
    return _search_drawn(given, sign, quantile, limit)


def _search_all(given: RuleInput, sign: float, quantile: float) -> Selection:
    """Return the exact best candidate: for each pair the k best local views, then the best pair.

    At a lower quantile, for each pair the k neighbours at this place in the order of its local views, then the pair at this
    place in the order of these sums.
    """
    scores, chosen_locals = given.required_scores(), given.candidates.num_chosen_local_views
    pairs_BP = sign * scores.pairs_BP
    if scores.locals_BPL is None or chosen_locals == 0:
        best, chosen = _at_quantile(pairs_BP, quantile)
        return given.select(chosen, scores=sign * best)
    skipped = _depth(quantile, given.candidates.num_local_views - chosen_locals + 1)
    top = (sign * scores.locals_BPL).topk(skipped + chosen_locals, dim=2)
    best, chosen = _at_quantile(pairs_BP + top.values[:, :, skipped:].sum(dim=2), quantile)
    of_chosen = chosen[:, None, None].expand(-1, 1, chosen_locals)
    local_indices = top.indices[:, :, skipped:].gather(1, of_chosen)[:, 0].sort(dim=1).values
    return given.select(chosen, local_indices=local_indices.T.contiguous(), scores=sign * best)


def _search_drawn(given: RuleInput, sign: float, quantile: float, limit: int) -> Selection:
    """Return the best of `limit` candidates, drawn with replacement, once for all images of a rank's step.

    Source: automl/hvp, branch dino, pretrain.py:49-76. Differs: the draw is addressed by (seed, step, rank) instead of
    taken from Python's unseeded generator, and a limit that reaches the number of candidates means the exact search.
    """
    scores, candidates = given.required_scores(), given.candidates
    words_each = 1 + candidates.num_local_views
    words = given.required_draw().words_of_step(Purpose.CANDIDATES, limit * words_each).reshape(limit, words_each)
    pair_R = to_device(indices_from_words(words[:, 0], len(candidates.pairs)), given.device)
    totals_BR = sign * scores.pairs_BP[:, pair_R]
    local_Rk = None
    if scores.locals_BPL is not None and candidates.num_chosen_local_views:
        local_Rk = to_device(subsets_from_words(words[:, 1:], candidates.num_chosen_local_views), given.device)
        totals_BR = totals_BR + sign * scores.locals_BPL[:, pair_R[:, None], local_Rk].sum(dim=2)
    best, at = _at_quantile(totals_BR, quantile)
    local_indices = None if local_Rk is None else local_Rk[at].T.contiguous()
    return given.select(pair_R[at], local_indices=local_indices, scores=sign * best)


def _depth(quantile: float, count: int) -> int:
    """Return the place, from 0, of a quantile in a descending order of `count` values."""
    return round((1.0 - quantile) * (count - 1))


def _at_quantile(values_BN: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return (value, index) at a quantile of each row; of equal values, the lowest index comes first."""
    depth = _depth(quantile, values_BN.shape[1])
    at = values_BN.sort(dim=1, descending=True, stable=True).indices[:, depth] if depth else values_BN.argmax(dim=1)
    return values_BN.gather(1, at[:, None])[:, 0], at
