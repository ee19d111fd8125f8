"""What the runs of a comparison gave: values by arm and seed, differences with intervals, and the summing-up sentence."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvp_ray.comparison.arms import HARDEST, VANILLA, VANILLA_LONG, PlannedRun, hard_arm_of
from hvp_ray.comparison.study import Study
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.evaluation.intervals import PairedDifference, paired_difference
from hvp_ray.evaluation.report import title_of_pixels
from hvp_ray.runs.prepare import is_finished
from hvp_ray.tracking.run_log import EVALUATIONS, read_records

METRIC_TITLES = {
    "knn_top1": "k-NN accuracy, all labels",
    "knn5shot_top1": "k-NN accuracy, 5 labels per class",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One evaluation during training."""

    step: int
    epoch: float
    compute: float
    """In epochs of the vanilla arm, by the comparison's accounting."""
    values: dict[str, float]
    """Name of the metric -> accuracy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What is read from one run's folder."""

    arm: str
    seed: int
    folder: Path
    summary: dict[str, Any]
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmValues:
    """One metric of one arm."""

    arm: str
    title: str
    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def std(self) -> float | None:
        """Over the seeds; None: one seed."""
        values = list(self.by_seed.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One arm against another, seed by seed."""

    arm: str
    reference: str
    question: str
    mean: float
    test: PairedDifference | None
    """None: one seed, so nothing can be said about chance."""

    @property
    def verdict(self) -> str:
        """What may be said: better, worse, or neither."""
        if self.test is None:
            return "not known"
        if self.test.interval.low > 0.0:
            return "better"
        return "worse" if self.test.interval.high < 0.0 else "no difference shown"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """Everything about one metric."""

    metric: str
    title: str
    arms: tuple[ArmValues, ...]
    differences: tuple[Difference, ...]
    references: dict[str, float]
    """Untrained encoder and raw pixels, mean over the runs that have them."""


def read_run(study: Study, run: PlannedRun) -> RunResult:
    """Read a finished run.

    Raises:
        DataError: it has not finished, or is another run than the planned one.
        CheckpointError: its config.json is damaged, or of a version that recorded less.
    """
    folder = study.folder.parent / run.name
    if not is_finished(run.config, run.identity):
        raise DataError(f"{folder} does not hold the finished run of this comparison; start the comparison again")
    priced = VANILLA if run.arm.name == VANILLA_LONG else run.arm.name
    ratio = study.ratio_of(priced)
    points = {}
    for record in read_records(folder, EVALUATIONS):
        epoch = record["step"] / study.steps_per_epoch
        values = {name.removeprefix("eval/"): value for name, value in record["metrics"].items()}
        points[record["step"]] = CurvePoint(step=record["step"], epoch=epoch, compute=epoch * ratio, values=values)
    curve = tuple(points[step] for step in sorted(points))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return RunResult(arm=run.arm.name, seed=run.seed, folder=folder, summary=summary, curve=curve)


def summarize_metric(study: Study, results: Sequence[RunResult], metric: str) -> MetricResult:
    """Compare all arms by one value of their summaries.

    Raises:
        ConfigError: no run has it.
        DataError: a run finished without it, because its evaluation failed.
    """
    values: dict[str, dict[int, float]] = {}
    for result in results:
        value = result.summary.get(metric)
        if not isinstance(value, int | float) or isinstance(value, bool):
            if problems := result.summary.get("problems"):
                raise DataError(
                    f"{result.folder} finished without {metric}: {'; '.join(problems)}. Repair the cause and "
                    f"start the comparison again: it repeats the evaluation and trains nothing"
                )
            known = [name for name, value in result.summary.items() if isinstance(value, float)]
            raise ConfigError(
                f"--metric {metric}: the runs have no such number (the data may have no labels); there are: "
                f"{', '.join(known)}"
            )
        values.setdefault(result.arm, {})[result.seed] = float(value)
    arms = tuple(ArmValues(arm=arm.name, title=arm.title, by_seed=values[arm.name]) for arm in study.arms)
    by_name = {arm.arm: arm for arm in arms}
    differences = [
        _difference(by_name[arm.name], by_name[VANILLA], f"{arm.name} against random views, equal epochs")
        for arm in study.arms
        if arm.name not in (VANILLA, VANILLA_LONG)
    ]
    if VANILLA_LONG in by_name:
        hard = hard_arm_of(study.arms).name
        question = f"{hard} against random views, equal compute"
        place = 1 + [difference.arm for difference in differences].index(hard)
        differences.insert(place, _difference(by_name[hard], by_name[VANILLA_LONG], question))
    references = {}
    pixels = title_of_pixels(study.base.views.global_views.size_px)
    for title, suffix in (("untrained encoder", "_untrained"), (pixels, "_pixels")):
        known_values = [value for result in results if (value := result.summary.get(metric + suffix)) is not None]
        if known_values:
            references[title] = float(np.mean(known_values))
    return MetricResult(
        metric=metric,
        title=METRIC_TITLES.get(metric, metric),
        arms=arms,
        differences=tuple(differences),
        references=references,
    )


def _difference(arm: ArmValues, reference: ArmValues, question: str) -> Difference:
    seeds = sorted(arm.by_seed)
    ours = np.array([arm.by_seed[seed] for seed in seeds])
    theirs = np.array([reference.by_seed[seed] for seed in seeds])
    return Difference(
        arm=arm.arm,
        reference=reference.arm,
        question=question,
        mean=float((ours - theirs).mean()),
        test=paired_difference(theirs, ours) if len(seeds) > 1 else None,
    )


def describe_difference(difference: Difference) -> str:
    """Return a difference in points with its interval."""
    text = f"{100 * difference.mean:+.1f} points"
    if difference.test is None:
        return text + " (one seed: no interval)"
    interval = difference.test.interval
    return f"{text} ({interval.level:.0%} interval {100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def describe_result(study: Study, result: MetricResult) -> str:
    """Return the finding in one sentence or two, without claiming more than the intervals do."""
    seeds = f"{len(study.seeds)} paired seed{'s' if len(study.seeds) > 1 else ''}"
    by_reference = {(d.arm, d.reference): d for d in result.differences}
    parts = []
    for (arm, reference), difference in by_reference.items():
        if (arm, reference) == (HARDEST, VANILLA):
            parts.append(f"at equal epochs hard views gave {describe_difference(difference)}, {_judged(difference)}")
        elif reference == VANILLA_LONG:
            who = "" if arm == HARDEST else f"{arm} gave "
            parts.append(f"at equal compute {who}{describe_difference(difference)}, {_judged(difference)}")
    if not parts:
        return f"{result.title}: see the table ({seeds})."
    subject = study.base.recipe
    text = f"{result.title} on {subject}, {seeds}: {'; '.join(parts)}."
    if len(study.seeds) < 5:
        text += " With so few seeds only large effects can be told from chance."
    return text


def _judged(difference: Difference) -> str:
    return {
        "better": "more than chance explains",
        "worse": "less than random views, more than chance explains",
        "no difference shown": "which chance explains as well",
        "not known": "of which one seed cannot say whether it is chance",
    }[difference.verdict]


def result_to_dict(result: MetricResult) -> dict[str, Any]:
    """Return plain values for JSON."""
    return {
        "metric": result.metric,
        "title": result.title,
        "references": result.references,
        "arms": {
            arm.arm: {"title": arm.title, "by_seed": arm.by_seed, "mean": arm.mean, "std": arm.std}
            for arm in result.arms
        },
        "differences": [
            {
                "arm": d.arm,
                "reference": d.reference,
                "question": d.question,
                "mean": d.mean,
                "interval": None if d.test is None else [d.test.interval.low, d.test.interval.high],
                "level": None if d.test is None else d.test.interval.level,
                "p_value": None if d.test is None else d.test.p_value,
                "verdict": d.verdict,
            }
            for d in result.differences
        ],
    }
