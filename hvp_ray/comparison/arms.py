"""The arms of a comparison: what each trains on, and the runs that make it up.

An arm changes how the views of a step are chosen, and nothing else: same images, same order, same crops (of the views that
both render), same initial weights for the same seed. One arm, `vanilla-long`, changes the length instead.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hvp_ray.config import RunConfig, SelectionConfig
from hvp_ray.errors import ConfigError
from hvp_ray.identity import Identity, Resolved, identity_of

VANILLA = "vanilla"
VANILLA_LONG = "vanilla-long"
HARDEST = "hardest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of choosing what is trained on."""

    name: str
    title: str
    """For tables and figures."""
    change: Callable[[SelectionConfig], SelectionConfig]
    is_control: bool = False

    def configure(self, config: RunConfig) -> RunConfig:
        """Return the run of this arm."""
        return dataclasses.replace(config, selection=self.change(config.selection))


def _rule(**fields: Any) -> Callable[[SelectionConfig], SelectionConfig]:
    """Return a change to a rule in every step, without what only some rules use."""
    neutral: dict[str, Any] = {"every": 1, "limit": None, "score_always": False, "scoring_resolution_px": None}

    def change(selection: SelectionConfig) -> SelectionConfig:
        return dataclasses.replace(selection, **(neutral | fields))

    return change


def _hardest(**fields: Any) -> Callable[[SelectionConfig], SelectionConfig]:
    """Return a change to hard views, with what the recipe says about scoring."""

    def change(selection: SelectionConfig) -> SelectionConfig:
        return dataclasses.replace(selection, rule="hardest", **fields)

    return change


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(name=VANILLA, title="random views", change=_rule(rule="first")),
        Arm(name=HARDEST, title="hard views (HVP)", change=_hardest()),
        Arm(
            name=VANILLA_LONG,
            title="random views, trained longer (equal compute)",
            change=_rule(rule="first"),
        ),
        Arm(
            name="random",
            title="control: a random pair of the rendered views",
            change=_rule(rule="random"),
            is_control=True,
        ),
        Arm(name="easiest", title="control: the easiest pair", change=_rule(rule="easiest"), is_control=True),
        Arm(
            name="min-iou",
            title="control: the pair of least overlap (no model)",
            change=_rule(rule="min_iou"),
            is_control=True,
        ),
        Arm(
            name="all-pairs",
            title="control: mean loss over all pairs",
            change=_rule(rule="all_pairs"),
            is_control=True,
        ),
        Arm(
            name="batch-norm",
            title="control: random pair; the other views are seen by BatchNorm only",
            change=_rule(rule="random", score_always=True, scoring_batch_norm="faithful"),
            is_control=True,
        ),
    )
}


def get_arm(name: str) -> Arm:
    """Return the arm of this name; `every-3` and `hardest-112px` stand for families.

    Raises:
        ConfigError: unknown; the message names the nearest one.
    """
    if name in ARMS:
        return ARMS[name]
    if match := re.fullmatch(r"every-([1-9]\d*)", name):
        every = int(match[1])
        return Arm(name=name, title=f"hard views in one step of {every}", change=_hardest(every=every))
    if match := re.fullmatch(r"hardest-([1-9]\d*)px", name):
        px = int(match[1])
        return Arm(name=name, title=f"hard views, scored at {px} px", change=_hardest(scoring_resolution_px=px))
    known = [*ARMS, "every-3", "hardest-112px"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"unknown arm {name!r}; did you mean {near!r}? There are: {', '.join(known)} (any number)")


def hard_arm_of(arms: Sequence[Arm]) -> Arm:
    """Return the arm whose compute `vanilla-long` gets: `hardest`, else the first arm with hard views.

    Raises:
        ConfigError: there is none.
    """
    hard = [arm for arm in arms if arm.name == HARDEST] + [
        arm for arm in arms if arm.name.startswith(("every-", "hardest-"))
    ]
    if not hard:
        raise ConfigError(f"the arm {VANILLA_LONG} needs an arm with hard views beside it: add {HARDEST}")
    return hard[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run of a comparison."""

    arm: Arm
    seed: int
    config: RunConfig
    """With its name; the same name again resumes it."""
    identity: Identity
    num_steps: int

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return str(self.config.run.name)


def plan_runs(
    base: RunConfig,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    resolved: Resolved,
    *,
    comparison: str,
    steps_per_epoch: int,
    compute_ratio: float,
) -> list[PlannedRun]:
    """Return all runs, seed by seed, so that a comparison that is stopped early has whole seeds.

    Args:
        base: recipe and overrides.
        arms: at least one.
        seeds: of the runs.
        resolved: what the settings of `base` result in.
        comparison: name; a run is named `<comparison>-<arm>-s<seed>`, and one of `vanilla-long` has its number of steps in
            its name: an arm that is added later may change the compute that is to be equal, and so this number.
        steps_per_epoch: of the data.
        compute_ratio: cost of a run with hard views in runs of the same length with random views: `vanilla-long` trains
            for so many times the steps.
    """
    num_steps = base.training.num_steps or base.training.epochs * steps_per_epoch
    knn_every = base.tracking.knn_every_epochs or max(1, round(num_steps / steps_per_epoch / 10))
    runs = []
    for seed in seeds:
        for arm in arms:
            steps = round(num_steps * compute_ratio) if arm.name == VANILLA_LONG else num_steps
            config = arm.configure(base)
            training, label = config.training, arm.name
            if arm.name == VANILLA_LONG:
                training, label = dataclasses.replace(training, num_steps=steps), f"{arm.name}-{steps}steps"
            config = dataclasses.replace(
                config,
                training=training,
                run=dataclasses.replace(config.run, name=f"{comparison}-{label}-s{seed}", seed=seed, resume=True),
                tracking=dataclasses.replace(
                    config.tracking, comparison=comparison, arm=label, knn_every_epochs=knn_every
                ),
            )
            identity = identity_of(config, resolved)
            runs.append(PlannedRun(arm=arm, seed=seed, config=config, identity=identity, num_steps=steps))
    return runs
