"""Resolve the schedule of hard views into what one step of a run does.

A run may begin with random views, turn to hard ones at `selection.start_fraction`, and reach their full hardness
`selection.ramp_fraction` later. Renderers, trainers and logs read a step's part of this here and nowhere else.
"""

import dataclasses
from dataclasses import dataclass

from hvp_ray.config import Rule, SelectionConfig, ViewsConfig
from hvp_ray.selection.candidates import Candidates
from hvp_ray.selection.rules import RULES


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSelection:
    """How the views of one step are selected."""

    rule: Rule
    """`first` on vanilla steps."""
    is_hard: bool
    """The step follows `selection.rule`."""
    needs_scores: bool
    """The step scores its candidates."""
    num_views: int
    """Global views rendered per image."""
    num_local_views: int
    """Local views rendered per image."""
    num_chosen_local_views: int
    limit: int | None
    quantile: float
    """See `rules.RuleInput.quantile`."""
    ramp_position: float
    """Position on the ramp: 0 where hardness begins, 1 at its full setting."""
    rescue_share: float = 1.0
    """See `Candidates.rescue_share`."""
    num_probe_images: int = 0
    """Images of each trainer whose pairs are all scored, for rule predicted to learn from."""

    def candidates(self, views: ViewsConfig) -> Candidates:
        """Return the candidates of the step."""
        return Candidates(
            num_views=self.num_views,
            num_local_views=self.num_local_views,
            num_chosen_local_views=self.num_chosen_local_views,
            alternating=views.slots_keep_transforms,
            limit=self.limit,
            rescue_share=self.rescue_share,
        )


def hard_step(selection: SelectionConfig, ramp_position: float = 1.0) -> StepSelection:
    """Return what a step that follows `selection.rule` does."""
    if selection.rule == "first":
        return vanilla_step(selection)
    rule, chosen_locals = RULES[selection.rule], selection.num_chosen_local_views or 0
    renders_candidates = not rule.chooses_before_rendering
    return StepSelection(
        rule=selection.rule,
        is_hard=True,
        needs_scores=rule.needs_scores or selection.score_always,
        num_views=selection.num_candidate_views if renders_candidates else 2,
        num_local_views=(selection.num_local_views or 0) if renders_candidates else chosen_locals,
        num_chosen_local_views=chosen_locals,
        limit=selection.limit,
        quantile=(1.0 - ramp_position) * selection.ramp_from + ramp_position * selection.quantile,
        ramp_position=ramp_position,
        rescue_share=selection.rescue_share,
        num_probe_images=selection.probe_images if rule.chooses_before_rendering else 0,
    )


def vanilla_step(selection: SelectionConfig) -> StepSelection:
    """Return what a step with random views does: it renders what it trains on, and more with `score_always`."""
    chosen_locals = selection.num_chosen_local_views or 0
    vanilla = StepSelection(
        rule="first",
        is_hard=False,
        needs_scores=False,
        num_views=2,
        num_local_views=chosen_locals,
        num_chosen_local_views=chosen_locals,
        limit=selection.limit,
        quantile=1.0,
        ramp_position=0.0,
    )
    if not selection.score_always:
        return vanilla
    return dataclasses.replace(
        vanilla,
        needs_scores=True,
        num_views=selection.num_candidate_views,
        num_local_views=selection.num_local_views or 0,
    )


def selection_at(selection: SelectionConfig, step: int, num_steps: int) -> StepSelection:
    """Return what step `step` of a run of `num_steps` steps does. Every process gets the same answer."""
    of_step = _scheduled_selection(selection, step, num_steps)
    probes = RULES[selection.rule].chooses_before_rendering and step % selection.probe_every == 0
    return dataclasses.replace(of_step, num_probe_images=selection.probe_images if probes else 0)


def _scheduled_selection(selection: SelectionConfig, step: int, num_steps: int) -> StepSelection:
    start, ramp = round(selection.start_fraction * num_steps), selection.ramp_fraction * num_steps
    # Rule all_pairs trains on all pairs from the first step; only their weights are scheduled.
    has_begun = step >= start or selection.rule == "all_pairs"
    if not has_begun or step % selection.every:
        return vanilla_step(selection)
    if step < start:
        return hard_step(selection, ramp_position=0.0)
    return hard_step(selection, ramp_position=min(1.0, (step - start) / ramp) if ramp else 1.0)
