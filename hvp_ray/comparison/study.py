"""A comparison on a disk or bucket: its settings, the cost of a step (measured once), and the runs that belong to it.

`<run.output>/<comparison>/` holds `comparison.json`, the report and its figures. The runs' folders are beside it.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hvp_ray.comparison.arms import VANILLA, VANILLA_LONG, Arm, get_arm, hard_arm_of
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.labels import match_labels
from hvp_ray.errors import ConfigError, LabelError
from hvp_ray.files import place_in, read_file, write_file
from hvp_ray.identity import Identity, Resolved, describe_difference, flat_values, identity_of
from hvp_ray.randomness import check_seed
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.location import output_location
from hvp_ray.runs.ownership import A_COMPARISON, RunClaim
from hvp_ray.runs.record import difference_from_record, resolve
from hvp_ray.selection import RULES

Accounting = Literal["measured", "counted"]
Budget = Literal["steps", "compute"]
"""What all arms of a comparison get alike: optimizer steps, or compute. `vanilla-long` has the compute of `hardest`."""

RECORD = "comparison.json"


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

    @property
    def location(self) -> str:
        """The run's folder, path or URI."""
        return place_in(output_location(self.config), self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """Everything that determines the runs and the report of a comparison."""

    name: str
    location: str
    """Folder of the comparison, path or URI."""
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

    def compute_until(self, run: PlannedRun, step: int) -> float:
        """Return the compute of the first `step` steps of a run, in random steps, by this comparison's accounting."""
        selection = run.config.selection
        rule, ratio = RULES[selection.rule], self.ratio_of(run.arm)
        if not rule.needs_scores or selection.score_always:
            return ratio * step
        start = round(selection.start_fraction * run.num_steps)  # the steps before it are random steps
        if step <= start:
            return float(step)
        return start + (step - start) * (ratio * run.num_steps - start) / (run.num_steps - start)

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

    Costs are measured and comparison.json is written by one process at a time, the owner of the comparison. Others wait for
    it, and take its costs.

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
        CheckpointError: config.json of one of its runs is damaged, or an earlier version wrote it. Or another process is
            doing the comparison.
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
    location = place_in(output_location(base), name)
    inline = resolve_inline(base.cluster)
    resolved = resolve(base, dataset, renderer=inline.renderer, device=inline.device)
    settings = settings_of(base, resolved, budget, accounting)
    study = Study(
        name=name,
        location=location,
        base=base,
        resolved=resolved,
        arms=tuple(arms),
        seeds=tuple(seeds),
        budget=budget,
        accounting=accounting,
        costs=_known_costs(location, settings, base),
        num_images=len(dataset.training_ids),
    )
    if _unknown_costs(study):
        # Check before anything is written or measured. Runs whose length follows from the costs are checked later.
        lengths_follow = {VANILLA_LONG} if budget == "steps" else set(arm_names) - {VANILLA}
        of_known_length = tuple(arm for arm in study.arms if arm.name not in lengths_follow)
        _check_runs(dataclasses.replace(study, arms=of_known_length, budget="steps"))
        with claim_comparison(location):
            # Another process may have measured meanwhile.
            study = dataclasses.replace(study, costs=_known_costs(location, settings, base))
            unknown = _unknown_costs(study)
            if unknown:
                study = dataclasses.replace(study, costs=study.costs | _measure(study, unknown, measure))
            _check_runs(study)
            if unknown:
                _write_record(study, settings)
        return study
    _check_runs(study)
    return study


def claim_comparison(location: str) -> RunClaim:
    """Return a claim on a comparison, a context manager: one process at a time does it.

    Raises:
        CheckpointError: another process is doing it, or the storage failed.
    """
    return RunClaim(location, job=secrets.token_hex(8), owned=A_COMPARISON)


def _known_costs(location: str, settings: dict[str, Any], base: RunConfig) -> dict[str, StepCost]:
    """Return the costs in comparison.json of a comparison with these settings; empty: it is new."""
    path = place_in(location, RECORD)
    try:
        content = read_file(path)
        known: dict[str, Any] = {} if content is None else json.loads(content)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; repair the file or the storage, or give another --comparison NAME"
        ) from error
    if known:
        _check_settings(location, known, settings, flat_values(base))
    return {arm: StepCost(**cost) for arm, cost in known.get("costs", {}).items()}


def _unknown_costs(study: Study) -> list[str]:
    names = dict.fromkeys([VANILLA, *(arm.priced_as for arm in study.arms)])
    return [name for name in names if name not in study.costs]


def _measure(
    study: Study, names: list[str], measure: Callable[[list[str]], dict[str, StepCost]]
) -> dict[str, StepCost]:
    """Costs are ratios of one measurement, so new ones are scaled to the known ones."""
    measured = measure(list(dict.fromkeys([VANILLA, *names])))
    known = study.costs.get(VANILLA)
    scale = 1.0 if known is None else known.step_seconds / measured[VANILLA].step_seconds
    return {name: measured[name].scaled(scale) for name in names}


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
    "optimizer.fused",
    "data.channels",
    "training.images_per_step",
    "training.accumulation_steps",
    "training.activation_checkpointing",
    "training.torch_threads",
    "training.precision",
    "cluster.num_trainers",
    "cluster.min_trainers",
    "cluster.sharding",
    "cluster.device",
)
"""Settings that the cost of a step depends on."""


def read_costs(path: str, base: RunConfig) -> dict[str, StepCost]:
    """Return the costs of a step that another comparison measured.

    Args:
        path: its comparison.json, path or URI.
        base: recipe and overrides of the new comparison.

    Raises:
        ConfigError: the file cannot be read, or its steps are of other settings.
    """
    try:
        content = json.loads(read_file(path, option="--costs") or b"")
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


def _check_settings(folder: str, known: dict[str, Any], settings: dict[str, Any], values: dict[str, Any]) -> None:
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
        difference = difference_from_record(run.location, run.config, run.identity)
        if difference:
            lines = "\n  ".join(difference)
            raise ConfigError(
                f"{run.location} holds another run than this comparison plans (its value -> planned):\n  {lines}\n"
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


def _write_record(study: Study, settings: dict[str, Any]) -> None:
    costs = {arm: dataclasses.asdict(cost) for arm, cost in study.costs.items()}
    content = {"settings": settings, "config": flat_values(study.base), "costs": costs}
    path = place_in(study.location, RECORD)
    try:
        write_file(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; give another --run.output") from error
