"""Arms of a comparison. An arm changes only how the views of a step are chosen.

Arms of a seed share images, order, initial weights, and the crops of views that both render. Only `vanilla-long` differs in
another way: it trains longer.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvp_ray.config import EQUAL_WEIGHTS, RunConfig
from hvp_ray.errors import ConfigError

VANILLA = "vanilla"
VANILLA_LONG = "vanilla-long"
HARDEST = "hardest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of choosing views."""

    name: str
    title: str
    """Description in tables and figures."""
    selection: Mapping[str, Any]
    """Fields of `SelectionConfig` that the arm sets."""
    is_control: bool = False

    @property
    def priced_as(self) -> str:
        """Arm whose steps cost as much as the steps of this one."""
        return VANILLA if self.name == VANILLA_LONG else self.name

    def configure(self, config: RunConfig) -> RunConfig:
        """Return the run of this arm."""
        return dataclasses.replace(config, selection=dataclasses.replace(config.selection, **self.selection))


_EVERY_STEP = {
    "every": 1,
    "start_fraction": 0.0,
    "ramp_fraction": 0.0,
    "quantile": 1.0,
    "limit": None,
    "score_always": False,
    "scoring_resolution_px": None,
    **EQUAL_WEIGHTS,
}
"""Neutral values of what a recipe sets for hard views."""
_RANDOM_VIEWS = _EVERY_STEP | {"rule": "first"}


def _hardest(name: str, title: str, **selection: Any) -> Arm:
    """Return an arm with hard views, scored as the recipe says."""
    return Arm(name=name, title=title, selection={"rule": "hardest", **EQUAL_WEIGHTS} | selection)


def _control(name: str, title: str, **selection: Any) -> Arm:
    return Arm(name=name, title=f"control: {title}", selection=_EVERY_STEP | selection, is_control=True)


ARMS = {
    arm.name: arm
    for arm in (
        Arm(name=VANILLA, title="random views", selection=_RANDOM_VIEWS),
        _hardest(HARDEST, "hard views (HVP)"),
        Arm(name=VANILLA_LONG, title="random views, trained longer (equal compute)", selection=_RANDOM_VIEWS),
        _control("random", "a random pair of the rendered views", rule="random"),
        _control("easiest", "the easiest pair", rule="easiest"),
        _control("min-iou", "the pair of least overlap (no model)", rule="min_iou"),
        _control("all-pairs", "mean loss over all pairs", rule="all_pairs"),
        _control(
            "batch-norm",
            "random pair; the other views are seen by BatchNorm only",
            rule="random",
            score_always=True,
            scoring_batch_norm="faithful",
        ),
    )
}


def get_arm(name: str) -> Arm:
    """Return the arm of this name. `every-3` and `hardest-112px` stand for families.

    Raises:
        ConfigError: the name is unknown. The message suggests the nearest one.
    """
    if name in ARMS:
        return ARMS[name]
    if match := re.fullmatch(r"every-([1-9]\d*)", name):
        return _hardest(name, f"hard views in one step of {match[1]}", every=int(match[1]))
    if match := re.fullmatch(r"hardest-([1-9]\d*)px", name):
        return _hardest(name, f"hard views, scored at {match[1]} px", scoring_resolution_px=int(match[1]))
    known = [*ARMS, "every-3", "hardest-112px"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"unknown arm {name!r}; did you mean {near!r}? There are: {', '.join(known)} (any number)")


def hard_arm_of(arms: Sequence[Arm]) -> Arm:
    """Return the arm whose compute `vanilla-long` gets: `hardest`, else the first arm with hard views.

    Raises:
        ConfigError: no arm has hard views.
    """
    hard = [arm for arm in arms if arm.selection["rule"] == "hardest"]
    if not hard:
        raise ConfigError(f"the arm {VANILLA_LONG} needs an arm with hard views beside it: add {HARDEST}")
    return next((arm for arm in hard if arm.name == HARDEST), hard[0])
