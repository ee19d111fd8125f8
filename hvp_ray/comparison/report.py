"""The report of a comparison: one HTML page without links to other files, PNG figures, and all values as JSON.

It is a function of the runs' folders and `comparison.json`, so a second call writes the same report. A report on a bucket is
written to a copy on this machine first.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvp_ray.comparison.arms import VANILLA, VANILLA_LONG
from hvp_ray.comparison.figures import draw_comparison
from hvp_ray.comparison.results import (
    CANDIDATES,
    METRIC_TITLES,
    MetricResult,
    RunResult,
    describe_difference,
    describe_result,
    describe_shortfall,
    read_run,
    summarize_metric,
)
from hvp_ray.comparison.study import Study
from hvp_ray.config import config_to_dict, flatten
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.files import Folder, is_uri
from hvp_ray.local_cache import write_local
from hvp_ray.runs.storage import working_folder
from hvp_ray.tracking.logged_pairs import read_selection_log
from hvp_ray.tracking.page import render_page
from hvp_ray.tracking.selection_analysis import SelectionAnalysis, analyse_selection
from hvp_ray.tracking.selection_figures import draw_selection_figures

_FIGURE_TEXTS = {
    "result.png": "Every point is one run; the bar is the mean. Right: mean difference over paired seeds, with its "
    "Student interval. An interval that contains 0 shows no difference.",
    "knn_over_epochs.png": "Thin lines are single seeds. The arms see the same images in the same order.",
    "knn_over_compute.png": "The same curves over compute: the cost of a step of each arm times its steps.",
    "selection_iou.png": "Overlap of the crops of the chosen pair, and of the pairs that were not chosen.",
    "selection_min_iou_share.png": "How often the chosen pair is the one of least overlap.",
    "selection_color.png": "Colour distance of the chosen pair, and of the others.",
    "selection_iou_histogram.png": "Overlap in the last third of the run.",
    "selection_importance.png": "Which differences between two views make a pair be chosen.",
    "candidate_views.png": "Real candidates of one run, scored with its final weights. The hardest choice is framed.",
}
_RUN_VALUES = (
    "num_steps",
    "weights_digest",
    "knn_top1",
    "knn5shot_top1",
    "chosen_iou_mean",
    "other_iou_mean",
    "num_collapse_warnings",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A written report."""

    sentence: str
    warning: str | None
    """No arm is better than an untrained encoder or raw pixels."""
    location: str
    """Folder of the comparison, path or URI."""
    html_path: Path
    """The page on this machine; of a comparison on a bucket, a copy."""
    json_path: Path
    figures: tuple[Path, ...]
    primary: MetricResult
    problems: tuple[str, ...]
    """Failures after training, each with the run's name."""


def write_report(study: Study, *, metric: str) -> Report:
    """Write report.html, report.json and figures/ into the comparison's folder.

    Args:
        study: comparison whose runs have all ended.
        metric: metric of the summaries that comes first.

    Raises:
        DataError: some run has not ended.
        ConfigError: the runs do not have this metric, or the report cannot be written.
        CheckpointError: a run on a bucket could not be read.
    """
    results = [read_run(study, run) for run in study.runs()]
    metrics = [metric, *(name for name in METRIC_TITLES if name != metric and results[0].summary.get(name) is not None)]
    summaries = [summarize_metric(study, results, name) for name in metrics]
    analyses = _analyse(study, results)
    folder = working_folder(study.location) / "copy" if is_uri(study.location) else Path(study.location)
    sentence = describe_result(study, summaries[0])
    json_path, html_path = folder / "report.json", folder / "report.html"
    content = {
        "comparison": study.name,
        "result": sentence,
        "recipe": study.base.recipe,
        "seeds": list(study.seeds),
        "budget": study.budget,
        "accounting": study.accounting,
        "compute_ratio": study.compute_ratio,
        "costs": {name: dataclasses.asdict(cost) for name, cost in study.costs.items()},
        "metrics": [summary.to_dict() for summary in summaries],
        "runs": [_run_to_dict(result) for result in results],
        "selection": {arm: analysis.to_dict() for arm, analysis in analyses.items()},
        "settings": flatten(config_to_dict(study.base)),
    }
    try:
        figures = _draw_figures(folder / "figures", study, results, summaries[0], analyses)
        write_local(json_path, (json.dumps(content, indent=1) + "\n").encode())
        write_local(html_path, render_report(study, results, summaries, analyses, figures).encode())
    except OSError as error:
        raise ConfigError(
            f"the report in {folder} cannot be written: {error.strerror or error}. Make room or repair the disk, then start "
            f"the comparison again"
        ) from error
    if is_uri(study.location):
        _upload(study.location, folder, [*figures, json_path, html_path])
    return Report(
        sentence=sentence,
        warning=describe_shortfall(summaries[0]),
        location=study.location,
        html_path=html_path,
        json_path=json_path,
        figures=tuple(figures),
        primary=summaries[0],
        problems=_problems_of(results),
    )


def render_report(
    study: Study,
    results: Sequence[RunResult],
    summaries: Sequence[MetricResult],
    analyses: dict[str, SelectionAnalysis],
    figures: Sequence[Path],
) -> str:
    """Return the HTML page.

    Args:
        study: the comparison.
        results: results of all its runs.
        summaries: all metrics, the primary one first.
        analyses: arm -> what its rule chose.
        figures: PNG files. The page embeds them.
    """
    return render_page(
        "hvp_ray.comparison",
        "report.html.jinja",
        _FIGURE_TEXTS,
        describe=describe_difference,
        study=study,
        runs={run.arm.name: run for run in study.runs()},
        results=results,
        summaries=summaries,
        sentences=[describe_result(study, summary) for summary in summaries],
        warnings=[warning for summary in summaries if (warning := describe_shortfall(summary)) is not None],
        collapsed=[result.name for result in results if result.summary.get("num_collapse_warnings")],
        problems=_problems_of(results),
        analyses=analyses,
        figures=figures,
        settings=flatten(config_to_dict(study.base)),
    )


def _problems_of(results: Sequence[RunResult]) -> tuple[str, ...]:
    return tuple(f"{r.name}: {problem}" for r in results for problem in r.summary.get("problems", ()))


def _analyse(study: Study, results: Sequence[RunResult]) -> dict[str, SelectionAnalysis]:
    """Analyse the choices of the first seed for every arm that chooses, hard views first; return arm -> analysis."""
    chooses = [r for r in results if r.seed == study.seeds[0] and r.arm not in (VANILLA, VANILLA_LONG)]
    analyses = {}
    for result in sorted(chooses, key=lambda result: not result.arm.startswith(("hardest", "every"))):
        try:
            analyses[result.arm] = analyse_selection(read_selection_log(result.folder))
        except DataError:
            continue  # all_pairs chooses nothing; or the log was switched off
    return analyses


def _draw_figures(
    folder: Path,
    study: Study,
    results: Sequence[RunResult],
    metric: MetricResult,
    analyses: dict[str, SelectionAnalysis],
) -> list[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    figures = draw_comparison(folder, study, results, metric)
    if analyses:
        figures += draw_selection_figures(folder, next(iter(analyses.values())))
    chooses = next((r for r in results if r.arm not in (VANILLA, VANILLA_LONG)), None)
    if chooses is not None and (candidates := chooses.folder / CANDIDATES).exists():
        figures.append(Path(shutil.copyfile(candidates, folder / candidates.name)))
    return figures


def _run_to_dict(result: RunResult) -> dict[str, Any]:
    values = {name: result.summary.get(name) for name in _RUN_VALUES}
    return {
        "name": result.name,
        "arm": result.arm,
        "seed": result.seed,
        **values,
        "problems": result.summary.get("problems", []),
        "curve": [dataclasses.asdict(point) for point in result.curve],
    }


def _upload(uri: str, folder: Path, paths: Sequence[Path]) -> None:
    """Copy the report to the bucket, the page last, and delete figures of an earlier report that it does not have."""
    remote, names = Folder(uri), [path.relative_to(folder).as_posix() for path in paths]
    try:
        for name in names:
            remote.write(name, (folder / name).read_bytes())
        for name in set(remote.names("figures")) - set(names):
            remote.delete(name)
    except OSError as error:
        raise ConfigError(
            f"the report could not be copied to {uri}: {error}. It is in {folder}. Repair the storage, then start the "
            f"comparison again"
        ) from error
