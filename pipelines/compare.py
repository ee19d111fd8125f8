"""Compare hard views with random views: arms x seeds, at equal epochs and at equal compute, and a report.

python pipelines/compare.py [RECIPE] [--arms NAME ...] [--seeds N ...] [--section.field VALUE ...]
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever it is started from

from hvp_ray.errors import HvpRayError
from hvp_ray.launch.environment import prepare_ray_environment
from pipelines.command_line import DEFAULT_RECIPE, leave, parse_run

_LINE_SECONDS = 20.0


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def positive(text: str) -> int:
    """Return a number of one or more."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parse_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this program, and RECIPE and overrides for the run."""
    parser = argparse.ArgumentParser(
        prog="compare.py [RECIPE]",
        description=__doc__,
        epilog="All other options are those of pretrain.py and hold for every arm: pretrain.py --help lists them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["vanilla", "hardest", "vanilla-long"],
        metavar="NAME",
        help="vanilla, hardest, vanilla-long (equal compute), every-K, hardest-Rpx, and the controls random, easiest, "
        "min-iou, all-pairs, batch-norm (default: %(default)s)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--comparison", metavar="NAME", help="its folder under run.output; the same name goes on")
    parser.add_argument(
        "--accounting",
        choices=["measured", "counted"],
        default="measured",
        help="equal compute by measured cost of a trainer's step (default), or by counted operations",
    )
    parser.add_argument(
        "--metric", choices=["knn_top1", "knn5shot_top1"], default="knn_top1", help="what is compared first"
    )
    parser.add_argument(
        "--views",
        choices=["auto", "inline", "workers"],
        default="auto",
        help="render in the run's own process, or in view workers",
    )
    parser.add_argument(
        "--parallel", type=positive, help="runs side by side (default: as many as the cluster has room for)"
    )
    parser.add_argument("--plan-only", action="store_true", help="say what would be done and how long it takes")
    return parser.parse_known_args(arguments)


class ProgressLines:
    """A line every twenty seconds."""

    def __init__(self) -> None:
        self._line_at = 0.0
        self._started = time.monotonic()
        self._first_steps: int | None = None

    def __call__(self, progress: Any) -> None:
        """Show how far the comparison is."""
        now = time.monotonic()
        if self._first_steps is None:
            self._first_steps = progress.steps_done
        if now - self._line_at < _LINE_SECONDS:
            return
        self._line_at = now
        done_here = progress.steps_done - self._first_steps
        rest = ""
        if done_here > 0:
            seconds = (now - self._started) / done_here * (progress.num_steps - progress.steps_done)
            rest = f", about {describe_seconds(seconds)} left"
        working = ", ".join(f"{name} {share:.0%}" for name, share in progress.running.items())
        say(
            f"{progress.num_done} of {progress.num_runs} runs done, {progress.steps_done / progress.num_steps:.0%} of all "
            f"steps{rest}{'; at work: ' if working else ''}{working}"
        )


def describe_seconds(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_plan(study: Any, mode: str, parallel: int) -> str:
    """Return what is compared, at what cost, and how long it will take."""
    threads = study.base.training.torch_threads if mode == "inline" else 1
    lines = [
        f"comparison {study.name}: {len(study.arms)} arms x {len(study.seeds)} seeds of {study.base.recipe}",
        f"folder     {study.folder}",
        "",
        f"{'arm':<14}{'steps':>8}{'epochs':>8}{'a step costs':>14}{'the run costs':>15}   what it trains on",
    ]
    total = 0.0
    runs = {run.arm.name: run for run in study.runs()}
    for arm in study.arms:
        run = runs[arm.name]
        priced = "vanilla" if arm.name == "vanilla-long" else arm.name
        cost, ratio = study.costs[priced], study.ratio_of(priced)
        compute = ratio * run.num_steps / study.num_steps
        epochs = run.num_steps / study.steps_per_epoch
        lines.append(f"{arm.name:<14}{run.num_steps:>8}{epochs:>8.1f}{ratio:>14.2f}{compute:>15.2f}   {arm.title}")
        rendering = cost.render_cpu_seconds if mode == "inline" else 0.0
        total += run.num_steps * (cost.step_seconds / threads + rendering) + 10.0
    what = (
        "measured before the start: CPU time of the trainer's step (GPU: device time), arms by turns"
        if study.accounting == "measured"
        else "counted operations of the trainer's step"
    )
    lines += [
        f"costs are in random steps and in runs of the vanilla arm; rendering is not in them;\n{what}",
        "",
    ]
    duration = describe_seconds(total * len(study.seeds) / parallel)
    lines += [
        f"{parallel} run(s) side by side; all of it takes about {duration} if the machine has nothing else to do; what is "
        "done already is not done again",
    ]
    return "\n".join(lines)


def describe_report(report: Any) -> str:
    """Return the result and where it lies."""
    lines = ["", report.sentence, ""]
    lines += [f"  {arm.arm:<14} {100 * arm.mean:6.2f} %   {arm.title}" for arm in report.primary.arms]
    lines += [f"  {name:<14} {100 * value:6.2f} %" for name, value in report.primary.references.items()]
    lines += [*([""] if report.problems else []), *(f"problem  {problem}" for problem in report.problems)]
    return "\n".join([*lines, "", f"report   {report.html_path}", f"numbers  {report.json_path}"])


def compare(options: argparse.Namespace, rest: list[str]) -> None:
    """Do what is missing, and write the report.

    Raises:
        HvpRayError: with a sentence for the user.
    """
    base = parse_run(rest or [DEFAULT_RECIPE], program="compare.py", description=__doc__ or "")
    prepare_ray_environment()
    from hvp_ray.comparison.runner import choose_mode, connect, do_runs, measure_on_cluster, num_parallel
    from hvp_ray.comparison.step_cost import StepCost
    from hvp_ray.comparison.study import check_arms_and_seeds, check_labels, open_study
    from hvp_ray.data.dataset import open_dataset
    from hvp_ray.data.inventory import take_inventory
    from hvp_ray.runs.intensity_check import check_intensities
    from hvp_ray.runs.prepare import check_before_start, output_folder, resolve, with_absolute_paths
    from hvp_ray.runs.rank import build_order

    base = with_absolute_paths(base)
    output_folder(base)  # a bucket is refused before anything else
    for arm in check_arms_and_seeds(options.arms, options.seeds):
        check_before_start(arm.configure(base))
    dataset = open_dataset(base.data)
    for line in (*take_inventory(dataset, base.data).lines(), *check_labels(base, dataset)):
        say(line)
    remark = check_intensities(base.data, dataset)
    if remark is not None:
        say(remark)
    device = connect(base, options.views)
    mode = choose_mode(base, device) if options.views == "auto" else options.views
    if mode == "inline" and base.cluster.device == "auto":
        device = "cpu"
    # Decided once for all runs: one that chose for itself might choose another device than its neighbours.
    base = dataclasses.replace(base, cluster=dataclasses.replace(base.cluster, device=device))

    def measure(arms: list[str]) -> dict[str, StepCost]:
        say(f"measuring what a step of {', '.join(arms)} costs ...")
        return measure_on_cluster(base, arms, device)

    study = open_study(
        base,
        resolve(base, dataset, renderer=base.cluster.chosen_renderer, device=device),
        name=options.comparison,
        arm_names=options.arms,
        seeds=options.seeds,
        accounting=options.accounting,
        steps_per_epoch=build_order(base, dataset).steps_per_epoch,
        measure=measure,
    )
    parallel = num_parallel(study.runs(), mode, wanted=options.parallel)
    say(describe_plan(study, mode, parallel))
    if options.plan_only:
        return
    do_runs(study.runs(), study.folder.parent, mode=mode, parallel=parallel, show=ProgressLines())
    say("all runs are done; writing the report ...")
    from hvp_ray.comparison.publish import publish_report
    from hvp_ray.comparison.report import write_report

    report = write_report(study, metric=options.metric)
    say(describe_report(report))
    link = publish_report(study, report)
    if link is not None:
        say(link)


def main(arguments: list[str]) -> int:
    """Compare; return the exit status."""
    try:
        options, rest = parse_options(arguments)
        compare(options, rest)
    except HvpRayError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoints", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
