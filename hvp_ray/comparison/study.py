"""A comparison on disk: its settings, the cost of a step (measured once), and the runs that belong to it.

`<run.output>/<comparison>/` holds `comparison.json`, the report and its figures. The runs' folders are beside it.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hvp_ray.comparison.arms import VANILLA, VANILLA_LONG, Arm, get_arm, hard_arm_of
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.labels import match_labels
from hvp_ray.errors import ConfigError, LabelError
from hvp_ray.identity import Identity, Resolved, describe_difference, flat_values, identity_of
from hvp_ray.randomness import check_seed
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.prepare import difference_from_record, output_folder, resolve

Accounting = Literal["measured", "counted"]
Budget = Literal["steps", "compute"]
"""What all arms of a comparison get alike: optimizer steps, or compute. `vanilla-long` has the compute of `hardest`."""

_FILE = "comparison.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One run of a comparison."""

    arm: Arm
    seed: int
    config: RunConfig
    """Config with a name, so that a second start resumes the run."""
    identity: Identity
    num_steps: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return str(self.config.run.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that determines the runs and the report of a comparison."""

    name: str
    folder: Path
    base: RunConfig
    resolved: Resolved
    """Data and device that the settings of all runs result in."""
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    budget: Budget
    accounting: Accounting
    costs: dict[str, StepCost]
    num_images: int
    """Training images."""

    @property
    def num_steps(self) -> int:
        """Steps of the arm with random views."""
        return self.base.training.total_steps(self.steps_per_epoch(self.base))

    def steps_per_epoch(self, config: RunConfig) -> int:
        """Return the steps of a pass over the data; arms may take fewer images per step."""
        return self.num_images // config.training.images_per_step

    @property
    def compute_ratio(self) -> float:
        """Cost of a run with hard views / cost of a run of the same length with random views."""
        if VANILLA_LONG not in {arm.name for arm in self.arms}:
            return 1.0
        return self.ratio_of(hard_arm_of(self.arms))

    def ratio_of(self, arm: Arm) -> float:
        """Return cost of the arm's step / cost of a random step, by this comparison's accounting."""
        cost, reference = self.costs[arm.priced_as], self.costs[VANILLA]
        if self.accounting == "measured":
            return cost.step_seconds / reference.step_seconds
        return cost.counted_operations / reference.counted_operations

    def runs(self) -> list[PlannedRun]:
        """Return all runs, seed by seed, so that a comparison that is stopped early has whole seeds."""
        return [self._plan(arm, seed) for seed in self.seeds for arm in self.arms]

    def _plan(self, arm: Arm, seed: int) -> PlannedRun:
        config, label, num_steps = arm.configure(self.base), arm.label, self.num_steps
        per_epoch = self.steps_per_epoch(config)
        if arm.name == VANILLA_LONG:
            # Its name has its length: an arm that is added later may change the compute to be equalled.
            num_steps = round(num_steps * self.compute_ratio)
            label = f"{arm.name}-{num_steps}steps"
        elif self.budget == "compute":
            num_steps = max(1, round(num_steps / self.ratio_of(arm)))
        if num_steps != config.training.total_steps(per_epoch):
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=num_steps))
        knn_every = self.base.tracking.knn_every_epochs or max(1, round(num_steps / per_epoch / 10))
        config = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, name=f"{self.name}-{label}-s{seed}", seed=seed, resume=True),
            tracking=dataclasses.replace(config.tracking, comparison=self.name, arm=label, knn_every_epochs=knn_every),
        )
        identity = identity_of(config, self.resolved)
        return PlannedRun(arm=arm, seed=seed, config=config, identity=identity, num_steps=num_steps)


def open_study(
    base: RunConfig,
    dataset: Dataset,
    *,
    name: str | None,
    arm_names: Sequence[str],
    seeds: Sequence[int],
    budget: Budget = "steps",
    accounting: Accounting,
    measure: Callable[[list[str]], dict[str, StepCost]],
) -> Study:
    """Make the folder of a new comparison, or continue one. Only arms and seeds may be added.

    Args:
        base: recipe and overrides, with absolute paths and a decided device.
        dataset: its data.
        name: None: `compare-<recipe>`.
        arm_names: see `arms.get_arm`.
        seeds: seeds of the runs.
        budget: what all arms get alike.
        accounting: meaning of equal compute.
        measure: arm names -> costs; called with arms whose costs are unknown.

    Raises:
        ConfigError: arms or seeds are unknown or repeated, or the comparison or one of its runs has other settings.
        CheckpointError: config.json of one of its runs is damaged, or an earlier version wrote it.
    """
    if base.run.accept_versions:
        raise ConfigError(
            "run.accept_versions=True is not allowed: the runs of a comparison share all versions of libraries; leave it out"
        )
    arms = check_arms_and_seeds(arm_names, seeds)
    if budget == "compute" and VANILLA_LONG in arm_names:
        raise ConfigError(f"--budget compute gives all arms equal compute, so leave out {VANILLA_LONG}")
    _check_schedule(base, arms, budget)
    name = name or f"compare-{base.recipe.replace(':', '-')}"
    path = output_folder(base) / name / _FILE
    inline = resolve_inline(base.cluster)
    resolved = resolve(base, dataset, renderer=inline.renderer, device=inline.device)
    settings = settings_of(base, resolved, budget, accounting)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if known:
        _check_settings(path.parent, known, settings, flat_values(base))
    costs = {arm: StepCost(**cost) for arm, cost in known.get("costs", {}).items()}
    study = Study(
        name=name,
        folder=path.parent,
        base=base,
        resolved=resolved,
        arms=tuple(arms),
        seeds=tuple(seeds),
        budget=budget,
        accounting=accounting,
        costs=costs,
        num_images=len(dataset.training_ids),
    )
    is_new = _add_costs(study, measure)
    _check_runs(study)
    if is_new:
        content = {"settings": settings, "config": flat_values(base)}
        _write(path, content | {"costs": {arm: dataclasses.asdict(cost) for arm, cost in study.costs.items()}})
    return study


def _add_costs(study: Study, measure: Callable[[list[str]], dict[str, StepCost]]) -> bool:
    """Measure the arms whose costs are unknown; tell whether there are any."""
    costs, names = study.costs, [arm.name for arm in study.arms]
    new = [name for name in dict.fromkeys([VANILLA, *(arm.priced_as for arm in study.arms)]) if name not in costs]
    if not new:
        return False
    # Check before time is spent on costs. Runs whose length follows from the costs are checked later.
    lengths_follow = {VANILLA_LONG} if study.budget == "steps" else set(names) - {VANILLA}
    of_known_length = tuple(arm for arm in study.arms if arm.name not in lengths_follow)
    _check_runs(dataclasses.replace(study, arms=of_known_length, budget="steps"))
    # Costs are ratios of one measurement: known ones stay, and new ones are scaled to them.
    measured = measure(list(dict.fromkeys([VANILLA, *new])))
    scale = costs[VANILLA].step_seconds / measured[VANILLA].step_seconds if VANILLA in costs else 1.0
    costs.update((name, measured[name].scaled(scale)) for name in new)
    return True


def settings_of(base: RunConfig, resolved: Resolved, budget: Budget, accounting: Accounting) -> dict[str, Any]:
    """Return by name everything that the metrics of a comparison depend on, except arm and seed."""
    identity = identity_of(base, resolved)
    shared = {name: value for name, value in identity.weights.items() if name != "run.seed"}
    return shared | identity.evaluation | {"budget": budget, "accounting": accounting}


_COST_SETTINGS = (
    "views.",
    "method.",
    "selection.",
    "optimizer.name",
    "training.images_per_step",
    "training.accumulation_steps",
    "training.torch_threads",
    "training.precision",
    "cluster.num_trainers",
    "cluster.device",
)
"""Settings that the cost of a step depends on."""


def read_costs(path: Path, base: RunConfig) -> dict[str, StepCost]:
    """Return the costs of a step that another comparison measured.

    Args:
        path: its comparison.json.
        base: recipe and overrides of the new comparison.

    Raises:
        ConfigError: the file cannot be read, or its steps are of other settings.
    """
    try:
        content = json.loads(path.read_text())
        known, costs = content["config"], {arm: StepCost(**cost) for arm, cost in content["costs"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--costs {path} is no comparison.json of this version ({error})") from error
    now = json.loads(json.dumps(flat_values(base)))
    differing = [
        f"{name}: {known.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(known | now)
        if name.startswith(_COST_SETTINGS) and known.get(name) != now.get(name)
    ]
    if differing:
        lines = "\n  ".join(differing)
        raise ConfigError(f"--costs {path} has the costs of other steps (its value -> yours):\n  {lines}")
    return costs


def _check_settings(folder: Path, known: dict[str, Any], settings: dict[str, Any], values: dict[str, Any]) -> None:
    if "config" not in known:
        raise ConfigError(
            f"the comparison {folder} was started by an earlier version of hvp_ray, which did not record all settings; "
            f"continue it with that version, or choose another --comparison NAME"
        )
    difference = describe_difference(known["settings"], settings, known["config"], values)
    if difference:
        lines = "\n  ".join(difference)
        raise ConfigError(
            f"the comparison {folder} was started with other settings (its value -> yours):\n  {lines}\n"
            f"Use its settings and versions, or another --comparison NAME"
        )


def _check_runs(study: Study) -> None:
    """Check that each folder with the name of a planned run is empty or holds this run."""
    for run in study.runs():
        folder = study.folder.parent / run.name
        difference = difference_from_record(str(folder), run.config, run.identity)
        if difference:
            lines = "\n  ".join(difference)
            raise ConfigError(
                f"{folder} holds another run than this comparison plans (its value -> planned):\n  {lines}\n"
                f"Use its settings and versions, choose another --comparison NAME, or move the folder away"
            )


def _check_schedule(base: RunConfig, arms: Sequence[Arm], budget: Budget) -> None:
    """Check that every arm ends its schedule, however many steps its epochs have."""
    images = {arm.configure(base).training.images_per_step for arm in arms}
    if base.optimizer.schedule == "cosine-per-epoch" and (budget == "compute" or len(images) > 1):
        raise ConfigError(
            "optimizer.schedule='cosine-per-epoch' is not allowed for arms whose epochs or lengths differ, because the last "
            "learning rates would differ; give --optimizer.schedule cosine-per-step"
        )


def check_labels(base: RunConfig, dataset: Dataset) -> tuple[str, ...]:
    """Check before training that k-NN can judge the arms; return remarks on the labels, one sentence each.

    Raises:
        ConfigError: labels or test images are missing, or the k-NN is switched off.
        DataError: the labels of training and test images cannot be matched.
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
        ConfigError: arms are unknown, repeated or missing, or a seed is not allowed.
    """
    arms = [get_arm(name) for name in arm_names]
    for seed in seeds:
        check_seed(seed)
    for what, values in (("--arms", [arm.label for arm in arms]), ("--seeds", list(seeds))):
        if len(set(values)) != len(values):
            raise ConfigError(f"{what} {' '.join(map(str, values))}: name each only once")
    if VANILLA not in arm_names:
        raise ConfigError(f"--arms {' '.join(arm_names)}: {VANILLA} is missing; add it, because it is the reference")
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
