"""Results of a comparison: values by arm and seed, paired differences with intervals, and the summary sentence."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvp_ray.comparison.arms import HARDEST, VANILLA, VANILLA_LONG, hard_arm_of
from hvp_ray.comparison.study import PlannedRun, Study
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.evaluation.intervals import PairedDifference, holm, paired_difference
from hvp_ray.evaluation.report import title_of_pixels
from hvp_ray.files import is_uri
from hvp_ray.runs.record import summary_of
from hvp_ray.runs.storage import fetch_run
from hvp_ray.tracking.run_log import EVALUATIONS, read_records

METRIC_TITLES = {
    "knn_top1": "k-NN accuracy, all labels",
    "knn5shot_top1": "k-NN accuracy, 5 labels per class",
}
CANDIDATES = "figures/candidate_views.png"
"""Figure of a run that the report shows."""
_LEAST_SEEDS = 3
"""For a claim."""
_JUDGEMENTS = {
    "better": "more than chance explains",
    "worse": "less than random views, more than chance explains",
    "no difference shown": "which is within chance",
    "not known": "which cannot be told from chance",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """One evaluation during training."""

    step: int
    epoch: float
    compute: float
    """Compute in epochs of the vanilla arm, by the comparison's accounting."""
    values: dict[str, float]
    """Metric -> accuracy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """Content of one run's folder."""

    arm: str
    seed: int
    name: str
    location: str
    """The run's folder, path or URI."""
    folder: Path
    """It, or a copy of what the report needs of it on this machine."""
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
        """Average over seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds. None: there is one seed."""
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
    """None: there is one seed, so there is no interval."""
    adjusted_p_value: float | None = None
    """p-value among all differences of the metric; see `holm`. None: there is no interval."""

    @property
    def has_interval(self) -> bool:
        """Whether the seeds differ, so that chance can be estimated."""
        return self.test is not None and not self.test.is_degenerate

    @property
    def verdict(self) -> str:
        """Return the claim that the seeds allow. Few seeds may differ by the same few test images by chance."""
        if self.test is None or self.test.num_seeds < _LEAST_SEEDS or self.adjusted_p_value is None:
            return "not known"
        if self.adjusted_p_value >= 1.0 - self.test.interval.level:
            return "no difference shown"
        return "better" if self.mean > 0.0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        test = self.test if self.has_interval else None
        return {
            "arm": self.arm,
            "reference": self.reference,
            "question": self.question,
            "mean": self.mean,
            "interval": None if test is None else [test.interval.low, test.interval.high],
            "level": None if test is None else test.interval.level,
            "p_value": None if test is None else test.p_value,
            "adjusted_p_value": self.adjusted_p_value,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """One metric of all arms."""

    metric: str
    title: str
    arms: tuple[ArmValues, ...]
    differences: tuple[Difference, ...]
    references: dict[str, float]
    """Untrained encoder and raw pixels, averaged over the runs that have them."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "metric": self.metric,
            "title": self.title,
            "references": self.references,
            "arms": {
                arm.arm: {"title": arm.title, "by_seed": arm.by_seed, "mean": arm.mean, "std": arm.std}
                for arm in self.arms
            },
            "differences": [difference.to_dict() for difference in self.differences],
        }


def read_run(study: Study, run: PlannedRun) -> RunResult:
    """Read a finished run.

    Raises:
        DataError: it has not finished, or is another run than the planned one.
        CheckpointError: its config.json is damaged, or an earlier version wrote it. Or the bucket failed.
        ConfigError: the storage cannot be read, or the local disk cannot take copies from a bucket.
    """
    summary = summary_of(run.config, run.identity)
    if summary is None:
        raise DataError(f"{run.location} does not hold the finished run of this comparison; start the comparison again")
    folder = Path(run.location)
    if is_uri(run.location):
        folder = fetch_run(run.location, files=(CANDIDATES,), folders=("log",), option="run.output")
    per_epoch = study.steps_per_epoch(run.config)
    points = {}
    for record in read_records(folder, EVALUATIONS):
        compute = study.compute_until(run, record["step"]) / study.steps_per_epoch(study.base)
        values = {name.removeprefix("eval/"): value for name, value in record["metrics"].items()}
        points[record["step"]] = CurvePoint(
            step=record["step"], epoch=record["step"] / per_epoch, compute=compute, values=values
        )
    curve = tuple(points[step] for step in sorted(points))
    return RunResult(
        arm=run.arm.name,
        seed=run.seed,
        name=run.name,
        location=run.location,
        folder=folder,
        summary=summary,
        curve=curve,
    )


def summarize_metric(study: Study, results: Sequence[RunResult], metric: str) -> MetricResult:
    """Compare all arms by one value of their summaries.

    Raises:
        ConfigError: no run has it.
        DataError: a run finished without it, because its evaluation failed.
    """
    values: dict[str, dict[int, float]] = {}
    for result in results:
        values.setdefault(result.arm, {})[result.seed] = _value_of(result, metric)
    arms = {arm.name: ArmValues(arm=arm.name, title=arm.title, by_seed=values[arm.name]) for arm in study.arms}
    differences = []
    for arm in study.arms:
        if arm.name in (VANILLA, VANILLA_LONG):
            continue
        question = f"{arm.name} against random views, equal"
        differences.append(_compare(arms[arm.name], arms[VANILLA], f"{question} {study.budget}"))
        if VANILLA_LONG in arms and arm is hard_arm_of(study.arms):
            differences.append(_compare(arms[arm.name], arms[VANILLA_LONG], f"{question} compute"))
    references = {}
    pixels = title_of_pixels(study.base.views.global_views.size_px)
    for title, suffix in (("untrained encoder", "_untrained"), (pixels, "_pixels")):
        known = [value for result in results if (value := result.summary.get(metric + suffix)) is not None]
        if known:
            references[title] = float(np.mean(known))
    return MetricResult(
        metric=metric,
        title=METRIC_TITLES.get(metric, metric),
        arms=tuple(arms.values()),
        differences=_adjust_p_values(differences),
        references=references,
    )


def _value_of(result: RunResult, metric: str) -> float:
    value = result.summary.get(metric)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if problems := result.summary.get("problems"):
        raise DataError(
            f"{result.location} finished without {metric}: {'; '.join(problems)}. Repair the cause and "
            f"start the comparison again: it repeats the evaluation and trains nothing. If the weights have diverged, leave "
            f"the arm out, or start another comparison with a lower learning rate"
        )
    known = [name for name, value in result.summary.items() if isinstance(value, float)]
    raise ConfigError(
        f"--metric {metric}: the runs have no such metric (the data may have no labels); there are: {', '.join(known)}"
    )


def _compare(arm: ArmValues, reference: ArmValues, question: str) -> Difference:
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


def _adjust_p_values(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    p_values = {d: d.test.p_value for d in differences if d.test is not None and d.has_interval}
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return tuple(dataclasses.replace(d, adjusted_p_value=adjusted.get(d)) for d in differences)


def describe_difference(difference: Difference) -> str:
    """Return a difference in points with its interval."""
    text = f"{100 * difference.mean:+.1f} points"
    if difference.test is None:
        return text + " (one seed: no interval)"
    interval = difference.test.interval
    if difference.test.is_degenerate:
        return text + f" (equal on all {difference.test.num_seeds} seeds: no interval)"
    return f"{text} ({interval.level:.0%} interval {100 * interval.low:+.1f} to {100 * interval.high:+.1f})"


def describe_shortfall(result: MetricResult) -> str | None:
    """Return a warning if no arm beats every untrained reference, else None."""
    best = max(arm.mean for arm in result.arms)
    better = [f"{name} ({100 * value:.1f} %)" for name, value in result.references.items() if value >= best]
    if not better:
        return None
    return (
        f"{result.title}: no arm is better than {' or '.join(better)}; the best has {100 * best:.1f} %. Differences between "
        f"such encoders may not hold for a full training."
    )


def _judge(difference: Difference, num_differences: int) -> str:
    text = _JUDGEMENTS[difference.verdict]
    interval = None if difference.test is None else difference.test.interval
    if (
        difference.verdict == "no difference shown"
        and interval is not None
        and not interval.low <= 0.0 <= interval.high
    ):
        text += f" among {num_differences} differences"
    return text


def describe_result(study: Study, result: MetricResult) -> str:
    """Return the finding in one or two sentences, claiming no more than the intervals allow."""
    seeds = f"{len(study.seeds)} paired seed{'s' if len(study.seeds) > 1 else ''}"
    parts = []
    for difference in result.differences:
        finding = f"{describe_difference(difference)}, {_judge(difference, len(result.differences))}"
        if (difference.arm, difference.reference) == (HARDEST, VANILLA):
            parts.append(f"at equal {study.budget} hard views gave {finding}")
        elif difference.reference == VANILLA_LONG:
            who = "" if difference.arm == HARDEST else f"{difference.arm} gave "
            parts.append(f"at equal compute {who}{finding}")
    if not parts:
        return f"{result.title}: see the table ({seeds})."
    text = f"{result.title} on {study.base.recipe}, {seeds}: {'; '.join(parts)}."
    if len(study.seeds) < 5:
        text += " With so few seeds only large effects can be distinguished from chance."
    return text
