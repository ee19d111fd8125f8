"""Which views are rendered, and which of them are trained on."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from hvp_ray.config.checks import AtLeast1, Checked, Fraction, Positive, Range, require

Rule = Literal["hardest", "first", "random", "easiest", "min_iou", "all_pairs", "predicted"]
"""Which pair of views is trained on; `SelectionConfig.rule` explains each value."""

Weighting = Literal["mean", "softmax", "matching", "top_k", "partner"]
"""How much each pair of an image counts with rule all_pairs; `SelectionConfig.weighting` explains each value."""

MOST_MATCHED_VIEWS = 8
"""They have 105 perfect matchings, which are all compared. Ten views would have 945."""

_USED_BY: dict[str, tuple[Rule, ...]] = {
    "rescue_share": ("hardest",),
    "quantile": ("hardest", "predicted"),
    "start_fraction": ("hardest", "random", "easiest", "min_iou", "all_pairs", "predicted"),
    "ramp_fraction": ("hardest", "all_pairs", "predicted"),
    "ramp_from": ("hardest", "predicted"),
    "num_plans": ("predicted",),
    "probe_every": ("predicted",),
    "probe_images": ("predicted",),
    "predictor_delay": ("predicted",),
    "weighting": ("all_pairs",),
    "weight_temperature": ("all_pairs",),
    "weight_top_k": ("all_pairs",),
    "reuse_student": ("hardest", "easiest"),
}
"""Fields that only these rules read. With other rules they keep their defaults, so that no setting is without effect."""


_NumViews = Annotated[int, Range(least=2, most=64)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig(Checked):
    """Which views are rendered, and which of them are trained on."""

    path: ClassVar[str] = "selection"

    rule: Rule = "hardest"
    """Which pair is trained on. hardest: the one with the largest loss under the current weights (HVP). first: views 0 and
    1, the only ones rendered (vanilla). Controls: random (a random pair), easiest (smallest loss), min_iou (crops that
    overlap least; no model involved). all_pairs: every rendered view is trained on, and the loss is the mean over all
    pairs, weighted by `weighting`. predicted: the hardest pair of `num_plans` plans, as a model of plans predicts
    it; only this pair is rendered (docs/proposals.md)."""

    num_views: _NumViews | None = 4
    """SimSiam, SimCLR: views rendered per image; the pair is chosen among num_views * (num_views - 1) / 2 (the paper: 4; 8
    gained nothing more). None with multi-crop."""

    num_global_views: _NumViews | None = None
    """Multi-crop (DINO, iBOT): global views rendered per image. None: `num_views` is used."""

    num_local_views: Annotated[int, Range(least=0, most=256)] | None = None
    """Multi-crop: local views rendered per image. None: there are none."""

    num_chosen_local_views: int | None = None
    """Multi-crop: local views trained on. None: there are none."""

    limit: AtLeast1 | None = None
    """Compare only this many randomly drawn candidates, equal for all images of a rank's step (the authors: 64 or 128).
    None: compare all candidates, which costs nothing more. Only rules that compare scores use it."""

    rescue_share: Fraction = 1.0
    """Rule hardest: share of the images whose views are all scored. These are the easiest ones by views 0 and 1, which are
    scored of every image, and the only pair that the other images can be trained on. 0.5 with 4 views forwards 3 per image
    for scoring (docs/hard_views.md). 1: all views of all images are scored at once."""

    quantile: Fraction = 1.0
    """Rules hardest and predicted: which candidate is chosen among those of an image in the order of their loss. 1: the
    hardest. 0: the easiest. Between, the nearest place; with local views it holds for them and for the pair
    (docs/hard_views.md)."""

    every: AtLeast1 = 1
    """Every k-th step is a hard step. The others are vanilla steps, which render and ship only what they train on. With
    rule first all steps are vanilla."""

    start_fraction: Fraction = 0.0
    """Hard steps begin after this fraction of the run's steps; the steps before are vanilla. With rule all_pairs only the
    weighting begins then."""

    ramp_fraction: Fraction = 0.0
    """From their beginning, hardness rises for this fraction of the run's steps: linearly from `ramp_from` to `quantile`.
    With rule all_pairs, from the mean to the full weighting. 0: it is full at once."""

    ramp_from: Fraction = 0.5
    """Quantile at the beginning of the ramp; 0.5 is the median."""

    weighting: Weighting = "mean"
    """Rule all_pairs: how much each pair of an image counts, from the losses of the current step. mean: equally. softmax:
    by the softmax of the losses (`weight_temperature`). matching: the pairs of the hardest perfect matching, in which every
    view occurs once. top_k: the `weight_top_k` hardest pairs. partner: for each view the pair in which it is hardest."""

    weight_temperature: Positive = 1.0
    """Temperature of the softmax weights, in standard deviations of the image's pair losses. Near 0 only the hardest pair
    counts; a large one is the mean."""

    weight_top_k: AtLeast1 | None = None
    """Number of pairs with weighting top_k. None with the others."""

    num_plans: Annotated[int, Range(least=2, most=64)] = 16
    """Rule predicted: plans drawn per image; the pair is chosen among num_plans * (num_plans - 1) / 2 before anything is
    rendered."""

    probe_every: AtLeast1 = 4
    """Rule predicted: every k-th step also scores all pairs of some images, from which the predictor learns."""

    probe_images: Annotated[int, Range(least=2)] = 16
    """Rule predicted: images of each trainer that a probe scores, each with `num_views` (multi-crop: `num_global_views`)
    views."""

    predictor_delay: Annotated[int, Range(least=2)] = 32
    """Rule predicted: step t uses what was learned up to step t minus this. It must exceed the batches in flight, so that
    prefetching changes no bit. The first `predictor_delay` steps of a run are vanilla."""

    score_always: bool = False
    """Score even if the rule needs no scores: the control "extra views seen only by BatchNorm"."""

    scoring_resolution_px: Annotated[int, Range(least=4)] | None = None
    """Global views are scored at this resolution, resized on the device with antialiasing; local views shrink by the same
    factor. None: at full resolution."""

    scoring_batch_norm: Literal["batch", "faithful", "running"] = "batch"
    """BatchNorm statistics of scoring. batch: of the batch; the running statistics stay. faithful: of the batch, and
    scoring moves the running statistics, as in automl/hvp. running: the running statistics."""

    scoring_precision: Literal["training", "bfloat16"] = "training"
    """Precision of the networks while scoring. training: that of `training.precision`. bfloat16: autocast, even if
    training is in float32; for GPUs, and CPUs with bfloat16 instructions."""

    reuse_teacher: bool = True
    """DINO, iBOT: training reuses the teacher's outputs of scoring for the chosen views, if they are equal: scored at full
    resolution in the precision of training, by a teacher without BatchNorm."""

    reuse_student: bool = False
    """Training reuses the student's forward pass of scoring for the chosen views. A hard step costs 1.34 random steps instead
    of 1.67 (SimCLR, 4 views), and scoring takes more memory. For encoders without BatchNorm (Vision Transformers); see
    docs/row_reuse.md. Drop path draws once, in scoring."""

    def check_together(self, prefix: str) -> None:
        """Check the numbers of views, and that the rule and the weighting read what is set."""
        self._check_views(prefix)
        for name, used_by in _USED_BY.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            allowed = f"{default} with {prefix}rule={self.rule}, which does not read it ({', '.join(used_by)} do)"
            require(value == default or self.rule in used_by, f"{prefix}{name}", value, allowed)
        self._check_schedule(prefix)
        self._check_rescue(prefix)
        self._check_weighting(prefix)

    def _check_views(self, prefix: str) -> None:
        known = (self.num_views is None) != (self.num_global_views is None)
        allowed = f"None with {prefix}num_global_views (multi-crop), and a number without it"
        require(known, f"{prefix}num_views", self.num_views, allowed)
        local, chosen = self.num_local_views or 0, self.num_chosen_local_views or 0
        needs_globals = local == 0 or self.num_global_views is not None
        require(needs_globals, f"{prefix}num_local_views", local, f"None without {prefix}num_global_views")
        fits = (chosen == 0) == (local == 0) and 0 <= chosen <= local
        allowed = f"1 to {prefix}num_local_views={local}" if local else "None without local views"
        require(fits, f"{prefix}num_chosen_local_views", self.num_chosen_local_views, allowed)
        if self.rule == "predicted":
            name = "num_views" if self.num_global_views is None else "num_global_views"
            allowed = "3 or more with rule predicted, which learns from differences between the pairs of an image"
            require(self.num_candidate_views >= 3, f"{prefix}{name}", self.num_candidate_views, allowed)
            allowed = "False with rule predicted, which renders no other candidates"
            require(not self.score_always, f"{prefix}score_always", self.score_always, allowed)

    def _check_schedule(self, prefix: str) -> None:
        is_scheduled = (self.start_fraction, self.ramp_fraction) != (0.0, 0.0)
        allowed = f"no schedule of hardness ({prefix}start_fraction, {prefix}ramp_fraction) with equal weights"
        fits = self.rule != "all_pairs" or self.weighting != "mean" or not is_scheduled
        require(fits, f"{prefix}weighting", self.weighting, allowed)
        left = 1.0 - self.start_fraction
        allowed = f"at most {left:g}, what {prefix}start_fraction={self.start_fraction} leaves of the run"
        require(self.ramp_fraction <= left + 1e-9, f"{prefix}ramp_fraction", self.ramp_fraction, allowed)
        allowed = f"0.5 without a ramp ({prefix}ramp_fraction)"
        require(self.ramp_fraction > 0.0 or self.ramp_from == 0.5, f"{prefix}ramp_from", self.ramp_from, allowed)

    def _check_rescue(self, prefix: str) -> None:
        conditions = {
            "3 or more global views": self.num_candidate_views >= 3,
            f"{prefix}limit=None": self.limit is None,
            f"{prefix}quantile=1.0": self.quantile == 1.0,
            f"{prefix}ramp_fraction=0.0": self.ramp_fraction == 0.0,
            f"{prefix}reuse_student=False": not self.reuse_student,
        }
        for allowed, holds in conditions.items():
            fits = self.rescue_share == 1.0 or holds
            require(fits, f"{prefix}rescue_share", self.rescue_share, f"1.0 without {allowed}")

    def _check_weighting(self, prefix: str) -> None:
        allowed = f"1.0 without {prefix}weighting=softmax"
        fits = self.weighting == "softmax" or self.weight_temperature == 1.0
        require(fits, f"{prefix}weight_temperature", self.weight_temperature, allowed)
        is_set = self.weight_top_k is not None
        allowed = f"a number with {prefix}weighting=top_k, None with the others"
        require(is_set == (self.weighting == "top_k"), f"{prefix}weight_top_k", self.weight_top_k, allowed)
        number = self.num_candidate_views
        fits = self.weighting != "matching" or (number % 2 == 0 and number <= MOST_MATCHED_VIEWS)
        allowed = f"an even number of at most {MOST_MATCHED_VIEWS} views is matched, and {number} are rendered"
        require(fits, f"{prefix}weighting", self.weighting, allowed)

    def with_rule(self, rule: Rule, **fields: Any) -> "SelectionConfig":
        """Return this with another rule and these fields; others that the rule does not read get their defaults."""
        unread = (name for name, used_by in _USED_BY.items() if rule not in used_by)
        defaults: dict[str, Any] = {name: type(self).__dataclass_fields__[name].default for name in unread}
        return dataclasses.replace(self, rule=rule, **(defaults | fields))

    @property
    def num_candidate_views(self) -> int:
        """Global views of a hard step: `num_global_views`, or `num_views` without multi-crop."""
        number = self.num_views if self.num_global_views is None else self.num_global_views
        assert number is not None
        return number
