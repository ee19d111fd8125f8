"""A comparison from its base config to its report: check, connect to Ray, measure costs, plan, do the runs, and report."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvp_ray.comparison.progress import ShowProgress
from hvp_ray.comparison.publish import publish_report
from hvp_ray.comparison.report import Report, write_report
from hvp_ray.comparison.runner import (
    Mode,
    choose_mode,
    connect,
    do_runs,
    measure_on_cluster,
    num_parallel,
)
from hvp_ray.comparison.step_cost import StepCost
from hvp_ray.comparison.study import (
    Accounting,
    Budget,
    Study,
    check_arms_and_seeds,
    check_labels,
    claim_comparison,
    open_study,
    read_costs,
)
from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.inventory import take_inventory
from hvp_ray.errors import ConfigError
from hvp_ray.runs.channel_statistics import describe_channels
from hvp_ray.runs.check import check_before_start
from hvp_ray.runs.intensity_check import check_intensities
from hvp_ray.runs.location import for_all_nodes, with_absolute_paths


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedComparison:
    """A comparison whose arms have their steps, on the cluster that its runs will use."""

    study: Study
    mode: Mode
    parallel: int
    """Runs side by side."""


def plan_comparison(
    base: RunConfig,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    name: str | None = None,
    budget: Budget = "steps",
    accounting: Accounting = "measured",
    costs: str | None = None,
    mode: Mode | None = None,
    parallel: int | None = None,
    show: Callable[[str], None] = lambda _line: None,
) -> PlannedComparison:
    """Check everything, join or start Ray, and measure what a step of each arm costs.

    Args:
        base: config that all runs share.
        arms: names of arms.
        seeds: seeds of the runs.
        name: folder of the comparison under run.output; the same name continues it. None: a new one.
        budget: what all arms get alike.
        accounting: how equal compute is counted.
        costs: comparison.json of another comparison whose costs are used, path or URI. None: they are measured.
        mode: how the runs render. None: `choose_mode` decides.
        parallel: runs side by side. None: as many as fit.
        show: called with lines about the data and about what is done.

    Raises:
        HvpRayError: the message tells the user what to do.
    """
    base = for_all_nodes(with_absolute_paths(base))
    chosen, dataset = check_arms_and_seeds(list(arms), list(seeds)), open_dataset(base.data)
    for arm in chosen:
        check_before_start(arm.configure(base), dataset)
    inventory, remarks = take_inventory(dataset, base.data), check_intensities(base.data, dataset)
    remarks += describe_channels(base)
    for line in (*inventory.lines(), *check_labels(base, dataset), *remarks):
        show(line)
    connect(base, dataset, mode)
    mode, device = choose_mode(base.cluster, mode)
    # One device for all runs: a run that decides alone might choose another device.
    base = dataclasses.replace(base, cluster=dataclasses.replace(base.cluster, device=device))
    known_costs = None if costs is None else read_costs(costs, base)

    def measure(names: list[str]) -> dict[str, StepCost]:
        if known_costs is not None:
            if unknown := [name for name in names if name not in known_costs]:
                raise ConfigError(f"--costs {costs} has no costs of {', '.join(unknown)}; measure them with the others")
            return {name: known_costs[name] for name in names}
        show(f"measuring what a step of {', '.join(names)} costs ...")
        return measure_on_cluster(base, names, device)

    study = open_study(
        base,
        dataset,
        name=name,
        arm_names=list(arms),
        seeds=list(seeds),
        budget=budget,
        accounting=accounting,
        measure=measure,
    )
    return PlannedComparison(
        study=study, mode=mode, parallel=num_parallel(study.runs(), dataset, mode, wanted=parallel)
    )


def run_comparison(planned: PlannedComparison, *, metric: str, show: ShowProgress) -> tuple[Report, str | None]:
    """Do the missing runs, and write and publish the report; return it and a line with its address in MLflow.

    Args:
        planned: see `plan_comparison`.
        metric: metric that is compared first.
        show: called with the progress.

    Raises:
        HvpRayError: the message tells the user what to do.
    """
    study = planned.study
    with claim_comparison(study.location) as claim:
        do_runs(study, mode=planned.mode, parallel=planned.parallel, show=show, check_owner=claim.raise_if_lost)
        claim.check()
        report = write_report(study, metric=metric)
        return report, publish_report(study, report)
