"""A comparison as it lies on disk: its settings, the cost of a step (measured once), and the runs that belong to it.

`<run.output>/<comparison>/` holds `comparison.json`, the report and its figures; the runs lie beside it, under their names.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hvp_ray.comparison.arms import VANILLA, VANILLA_LONG, Arm, PlannedRun, get_arm, hard_arm_of, plan_runs
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.labels import match_labels
from hvp_ray.errors import ConfigError, LabelError
from hvp_ray.identity import Resolved, describe_difference, flat_values, identity_of
from hvp_ray.randomness import check_seed
from hvp_ray.runs.prepare import difference_from_record, output_folder

Accounting = Literal["measured", "counted"]

_FILE = "comparison.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that the runs and the report of a comparison follow from."""

    name: str
    folder: Path
    base: RunConfig
    resolved: Resolved
    """What the settings of `base`, and so of every run, result in."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    accounting: Accounting
    costs: dict[str, StepCost]
    num_steps: int
    """Of the arms at equal epochs."""
    steps_per_epoch: int

    @property
    def compute_ratio(self) -> float:
        """Cost of the run with hard views in runs of the same length with random views."""
        if VANILLA_LONG not in {arm.name for arm in self.arms}:
            return 1.0
        return self.ratio_of(hard_arm_of(self.arms).name)

    def ratio_of(self, arm_name: str) -> float:
        """Cost of an arm's step in random steps, by this comparison's accounting."""
        cost, reference = self.costs[arm_name], self.costs[VANILLA]
        if self.accounting == "measured":
            return cost.step_seconds / reference.step_seconds
        return cost.counted_operations / reference.counted_operations

    def runs(self) -> list[PlannedRun]:
        """Return all runs."""
        return plan_runs(
            self.base,
            self.arms,
            self.seeds,
            self.resolved,
            comparison=self.name,
            steps_per_epoch=self.steps_per_epoch,
            compute_ratio=self.compute_ratio,
        )


def open_study(
    base: RunConfig,
    resolved: Resolved,
    *,
    name: str | None,
    arm_names: Sequence[str],
    seeds: Sequence[int],
    accounting: Accounting,
    steps_per_epoch: int,
    measure: Callable[[list[str]], dict[str, StepCost]],
) -> Study:
    """Make the folder of a new comparison, or continue an existing one: arms and seeds may be added, nothing else.

    Args:
        base: recipe and overrides, with absolute paths.
        resolved: what its settings result in.
        name: None: `compare-<recipe>`.
        arm_names: see `arms.get_arm`.
        seeds: of the runs.
        accounting: what equal compute means.
        steps_per_epoch: of the data.
        measure: arm names -> costs; called with arms whose costs are not known yet.

    Raises:
        ConfigError: unknown or repeated arms or seeds, or the comparison, or one of its runs, exists with other settings.
        CheckpointError: config.json of one of its runs is damaged, or of a version that recorded less.
    """
    arms = check_arms_and_seeds(arm_names, seeds)
    name = name or f"compare-{base.recipe.replace(':', '-')}"
    folder = output_folder(base) / name
    path = folder / _FILE
    settings = settings_of(base, resolved, accounting)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if known:
        _check_settings(folder, known, settings, flat_values(base))
    costs = {arm: StepCost(**cost) for arm, cost in known.get("costs", {}).items()}
    needed = [name for name in dict.fromkeys([VANILLA, *(arm.name for arm in arms)]) if name != VANILLA_LONG]
    new = [arm for arm in needed if arm not in costs]
    if new:
        # Before time is spent on costs. How long `vanilla-long` is follows from them, so its runs are checked after that.
        known_arms = [arm for arm in arms if arm.name != VANILLA_LONG]
        plan = plan_runs(
            base, known_arms, seeds, resolved, comparison=name, steps_per_epoch=steps_per_epoch, compute_ratio=1.0
        )
        _check_runs(folder.parent, plan)
        # Costs are ratios of one measurement: what is known is kept, and what is new is brought to its scale.
        measured = measure(list(dict.fromkeys([VANILLA, *new])))
        scale = costs[VANILLA].step_seconds / measured[VANILLA].step_seconds if VANILLA in costs else 1.0
        for arm in new:
            costs[arm] = measured[arm].scaled(scale)
    study = Study(
        name=name,
        folder=folder,
        base=base,
        resolved=resolved,
        arms=tuple(arms),
        seeds=tuple(seeds),
        accounting=accounting,
        costs=costs,
        num_steps=base.training.num_steps or base.training.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )
    _check_runs(folder.parent, study.runs())
    if new:
        content = {"settings": settings, "config": flat_values(base)}
        _write(path, content | {"costs": {arm: cost.to_dict() for arm, cost in costs.items()}})
    return study


def settings_of(base: RunConfig, resolved: Resolved, accounting: Accounting) -> dict[str, Any]:
    """Return what all runs of a comparison have in common, by name: all that their numbers depend on but arm and seed."""
    identity = identity_of(base, resolved)
    shared = {name: value for name, value in identity.weights.items() if name != "run.seed"}
    return shared | identity.evaluation | {"accounting": accounting}


def _check_settings(folder: Path, known: dict[str, Any], settings: dict[str, Any], values: dict[str, Any]) -> None:
    if "config" not in known:
        raise ConfigError(
            f"the comparison {folder} was started by an earlier version of hvp_ray, which did not record all that its "
            f"numbers depend on; continue it with that version, or choose another --comparison NAME"
        )
    difference = describe_difference(known["settings"], settings, known["config"], values)
    if difference:
        lines = "\n  ".join(difference)
        raise ConfigError(
            f"the comparison {folder} was started with other settings (its value -> yours):\n  {lines}\n"
            f"Take its settings and versions, or another --comparison NAME"
        )


def _check_runs(output: Path, runs: Sequence[PlannedRun]) -> None:
    """Check that folders with the names of planned runs hold these runs: none is taken by its name alone."""
    for run in runs:
        folder = output / run.name
        difference = difference_from_record(str(folder), run.config, run.identity)
        if difference:
            lines = "\n  ".join(difference)
            raise ConfigError(
                f"{folder} holds another run than this comparison plans (its value -> planned):\n  {lines}\n"
                f"Take its settings and versions, choose another --comparison NAME, or move the folder away"
            )


def check_labels(base: RunConfig, dataset: Dataset) -> tuple[str, ...]:
    """Check before training that the arms can be judged; return remarks on the labels, one sentence each.

    Raises:
        ConfigError: there is no k-NN, because labels or test images are missing or it is switched off.
        DataError: training and test images have labels that cannot be matched.
    """
    needed = "the arms are judged by k-NN on labelled images"
    if not base.tracking.knn_images:
        raise ConfigError(f"{needed}, but tracking.knn_images=0; set it above 0")
    try:
        return match_labels(dataset).remarks
    except LabelError as error:
        raise ConfigError(
            f"{needed}, but {error}. Name labelled images by data.test_source, or hold some out by data.test_fraction, with "
            f"class folders or data.label_column"
        ) from error


def check_arms_and_seeds(arm_names: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """Return the arms of these names.

    Raises:
        ConfigError: unknown, repeated or missing arms, or seeds that cannot be.
    """
    arms = [get_arm(name) for name in arm_names]
    for seed in seeds:
        check_seed(seed)
    for what, values in (("--arms", list(arm_names)), ("--seeds", list(seeds))):
        if len(set(values)) != len(values):
            raise ConfigError(f"{what} {' '.join(map(str, values))}: each only once")
    if VANILLA not in arm_names:
        raise ConfigError(
            f"--arms {' '.join(arm_names)}: {VANILLA} is missing; it is what the others are compared with"
        )
    if VANILLA_LONG in arm_names:
        hard_arm_of(arms)
    return arms


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; give another --run.output") from error
