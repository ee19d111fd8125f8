"""Compare hard views with random views: arms x seeds, at equal epochs and at equal compute, and write a report.

hvp-ray compare [RECIPE] [--arms NAME ...] [--seeds N ...] [--section.field VALUE ...]
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

from hvp_ray.cli.command_line import RunOptions, exit_status, parse_run_options, say
from hvp_ray.config.checks import AtLeast1, PathOrUri
from hvp_ray.files import is_uri, place_in
from hvp_ray.launch.environment import prepare_ray_environment

_LINE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options of a comparison. Those of the run hold for every arm."""

    arms: tuple[str, ...] = ("vanilla", "hardest", "vanilla-long")
    """vanilla, hardest, vanilla-long (equal compute), all-pairs, predicted, fast-siam, asym-aug, and the controls random,
    easiest, min-iou, batch-norm; hardest:every=3,quantile=0.8 sets fields of selection."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""

    comparison: str | None = None
    """Its folder under run.output; the same name continues it."""

    budget: Literal["steps", "compute"] = "steps"
    """What all arms get alike: steps, or the compute of the vanilla arm (leave out vanilla-long)."""

    costs: PathOrUri | None = None
    """comparison.json of another comparison whose costs are used, a path or URI."""

    accounting: Literal["measured", "counted"] = "measured"
    """Equal compute by the measured cost of a trainer's step, or by counted operations."""

    metric: Literal["knn_top1", "knn5shot_top1"] = "knn_top1"
    """What is compared first."""

    views: Literal["auto", "inline", "workers"] = "auto"
    """Where views are rendered: in the run's own process, or in view workers."""

    parallel: AtLeast1 | None = None
    """Runs side by side. None: as many as the cluster has room for."""

    plan_only: bool = False
    """Print the plan and its duration, and train nothing. Costs that are not known are measured."""


class ProgressLines:
    """Prints a line every twenty seconds."""

    def __init__(self) -> None:
        self._line_at = 0.0
        self._started = time.monotonic()
        self._first_steps: int | None = None

    def __call__(self, progress: Any) -> None:
        """Print the progress of the comparison if it is time."""
        now = time.monotonic()
        if self._first_steps is None:
            self._first_steps = progress.steps_done
        if now - self._line_at < _LINE_SECONDS:
            return
        self._line_at = now
        done_here, rest = progress.steps_done - self._first_steps, ""
        if done_here > 0:
            seconds = (now - self._started) / done_here * (progress.num_steps - progress.steps_done)
            rest = f", about {describe_seconds(seconds)} left"
        running = ", ".join(f"{name} {share:.0%}" for name, share in progress.running.items())
        say(
            f"{progress.num_done} of {progress.num_runs} runs done, {progress.steps_done / progress.num_steps:.0%} of all "
            f"steps{rest}{'; running: ' if running else ''}{running}"
        )


def describe_seconds(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_plan(study: Any, mode: str, parallel: int) -> str:
    """Return what is compared, at what cost, and how long it will take."""
    threads = study.base.training.torch_threads if mode == "inline" else 1
    width = max(14, *(len(arm.name) + 2 for arm in study.arms))
    lines = [
        f"comparison {study.name}: {len(study.arms)} arms x {len(study.seeds)} seeds of {study.base.recipe}",
        f"folder     {study.location}",
        "",
        f"{'arm':<{width}}{'steps':>8}{'epochs':>8}{'a step costs':>14}{'the run costs':>15}   what it trains on",
    ]
    total = 0.0
    runs = {run.arm.name: run for run in study.runs()}
    for arm in study.arms:
        num_steps, cost, ratio = runs[arm.name].num_steps, study.costs[arm.priced_as], study.ratio_of(arm)
        compute = ratio * num_steps / study.num_steps
        epochs = num_steps / study.steps_per_epoch(runs[arm.name].config)
        lines.append(f"{arm.name:<{width}}{num_steps:>8}{epochs:>8.1f}{ratio:>14.2f}{compute:>15.2f}   {arm.title}")
        rendering = cost.render_cpu_seconds if mode == "inline" else 0.0
        total += num_steps * (cost.step_seconds / threads + rendering)
    what = (
        "measured before the start: CPU time of the trainer's step (GPU: device time), arms in turn"
        if study.accounting == "measured"
        else "counted operations of the trainer's step"
    )
    duration = describe_seconds(total * len(study.seeds) / parallel)
    return "\n".join(
        [
            *lines,
            f"step costs are relative to a random step, run costs to a vanilla run; rendering is not included\n{what}",
            "",
            f"{parallel} run(s) in parallel. All steps take about {duration} on an idle machine, plus start and evaluation "
            f"of each run. Finished runs are skipped.",
        ]
    )


def describe_report(report: Any) -> str:
    """Return the result and its files."""
    from hvp_ray.comparison.results import describe_difference

    arms, references = report.primary.arms, report.primary.references
    width = max(map(len, (*(arm.arm for arm in arms), *references)))
    lines = ["", report.sentence, *([] if report.warning is None else [report.warning]), ""]
    lines += [f"  {arm.arm:<{width}} {100 * arm.mean:6.2f} %   {arm.title}" for arm in arms]
    lines += [f"  {name:<{width}} {100 * value:6.2f} %" for name, value in references.items()]
    lines += ["", *(f"  {d.question}: {describe_difference(d)}: {d.verdict}" for d in report.primary.differences)]
    lines += [*([""] if report.problems else []), *(f"problem  {problem}" for problem in report.problems)]
    files = {"report": report.html_path, "numbers": report.json_path}
    lines += ["", *(f"{what:<9}{place_in(report.location, path.name)}" for what, path in files.items())]
    if is_uri(report.location):
        lines.append(f"copy     {report.html_path}")
    return "\n".join(lines)


def compare(options: Options) -> None:
    """Do the missing runs, and write the report.

    Raises:
        HvpRayError: the message tells the user what to do.
    """
    prepare_ray_environment()
    from hvp_ray.comparison.compare import plan_comparison, run_comparison

    planned = plan_comparison(
        options.run,
        arms=options.arms,
        seeds=options.seeds,
        name=options.comparison,
        budget=options.budget,
        accounting=options.accounting,
        costs=options.costs,
        mode=None if options.views == "auto" else options.views,
        parallel=options.parallel,
        show=say,
    )
    say(describe_plan(planned.study, planned.mode, planned.parallel))
    if options.plan_only:
        return
    report, link = run_comparison(planned, metric=options.metric, show=ProgressLines())
    say(describe_report(report))
    if link is not None:
        say(link)


def main(arguments: list[str]) -> int:
    """Compare; return the exit status."""
    stopped = "stopped; the same command continues from the last checkpoints"
    return exit_status(
        lambda: compare(parse_run_options(Options, arguments, program="hvp-ray compare", description=__doc__ or "")),
        stopped=stopped,
    )
