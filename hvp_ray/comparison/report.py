"""The report of a comparison: one HTML page that needs nothing else, PNG figures, and everything as JSON.

It is a function of the runs' folders and `comparison.json`: made again, it is the same, whatever was interrupted.
"""

import base64
import html
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvp_ray.comparison.arms import VANILLA, VANILLA_LONG
from hvp_ray.comparison.figures import draw_comparison
from hvp_ray.comparison.results import (
    METRIC_TITLES,
    MetricResult,
    RunResult,
    describe_difference,
    describe_result,
    read_run,
    result_to_dict,
    summarize_metric,
)
from hvp_ray.comparison.study import Study
from hvp_ray.config import config_to_dict, flatten
from hvp_ray.errors import DataError
from hvp_ray.tracking.logged_pairs import read_selection_log
from hvp_ray.tracking.selection_analysis import SelectionAnalysis, analyse_selection
from hvp_ray.tracking.selection_figures import draw_selection_figures

_AUTHORS_ROW = ("the authors", "epochs 20-99", "0.345-0.355", "0.485-0.49", "0.40-0.435", "0.167", "", "")
"""SimSiam, ResNet-50, ImageNet, epochs 20 to 99: automl/hvp, branch barlow-twins, analysis/plots."""

_FIGURE_TEXTS = {
    "result.png": "Every point is one run; the bar is the mean. Right: mean difference over paired seeds, with its "
    "Student interval. An interval that holds 0 shows no difference.",
    "knn_over_epochs.png": "Thin lines are single seeds. The arms see the same images in the same order.",
    "knn_over_compute.png": "The same against what was spent: the cost of a step of each arm times its steps.",
    "selection_iou.png": "Overlap of the crops of the chosen pair, and of the pairs that were not chosen.",
    "selection_min_iou_share.png": "How often the chosen pair is the one of least overlap.",
    "selection_color.png": "Colour distance of the chosen pair, and of the others.",
    "selection_iou_histogram.png": "Overlap in the last third of the run.",
    "selection_importance.png": "Which differences between two views make a pair be chosen.",
    "candidate_views.png": "Real candidates of one run, scored with its final weights: the hardest choice is framed.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was written."""

    sentence: str
    html_path: Path
    json_path: Path
    figures: tuple[Path, ...]
    primary: MetricResult
    problems: tuple[str, ...]
    """What failed in the runs after training, with the run's name."""


def write_report(study: Study, *, metric: str) -> Report:
    """Write report.html, report.json and figures/ into the comparison's folder.

    Args:
        study: whose runs have all ended.
        metric: value of the summaries that comes first.

    Raises:
        DataError: some run has not ended.
        ConfigError: the runs have no such value.
    """
    results = [read_run(study, run) for run in study.runs()]
    metrics = [metric, *(name for name in METRIC_TITLES if name != metric and results[0].summary.get(name) is not None)]
    summaries = [summarize_metric(study, results, name) for name in metrics]
    folder = study.folder / "figures"
    shutil.rmtree(folder, ignore_errors=True)
    figures = draw_comparison(folder, study, results, summaries[0])
    analyses = _analyse(study, results)
    first_hard = next((r for r in results if r.arm not in (VANILLA, VANILLA_LONG)), None)
    if analyses:
        figures += draw_selection_figures(folder, next(iter(analyses.values())))
    if first_hard is not None and (first_hard.folder / "figures" / "candidate_views.png").exists():
        figures.append(folder / "candidate_views.png")
        shutil.copyfile(first_hard.folder / "figures" / "candidate_views.png", figures[-1])
    sentence = describe_result(study, summaries[0])
    content = _content(study, results, summaries, analyses, sentence)
    json_path, html_path = study.folder / "report.json", study.folder / "report.html"
    _write(json_path, json.dumps(content, indent=1) + "\n")
    _write(html_path, _page(study, results, summaries, analyses, sentence, figures))
    return Report(
        sentence=sentence,
        html_path=html_path,
        json_path=json_path,
        figures=tuple(figures),
        primary=summaries[0],
        problems=_problems(results),
    )


def _problems(results: Sequence[RunResult]) -> tuple[str, ...]:
    return tuple(f"{r.folder.name}: {problem}" for r in results for problem in r.summary.get("problems", ()))


def _analyse(study: Study, results: Sequence[RunResult]) -> dict[str, SelectionAnalysis]:
    """Analyse the choices of the first seed's runs of every arm that chooses, hard views first; arm -> analysis."""
    seed = study.seeds[0]
    chooses = [r for r in results if r.seed == seed and r.arm not in (VANILLA, VANILLA_LONG)]
    chooses.sort(key=lambda result: not result.arm.startswith(("hardest", "every")))
    analyses = {}
    for result in chooses:
        try:
            analyses[result.arm] = analyse_selection(read_selection_log(result.folder))
        except DataError:
            continue  # all_pairs chooses nothing; or the log was switched off
    return analyses


def _content(
    study: Study,
    results: Sequence[RunResult],
    summaries: Sequence[MetricResult],
    analyses: dict[str, SelectionAnalysis],
    sentence: str,
) -> dict[str, Any]:
    return {
        "comparison": study.name,
        "result": sentence,
        "recipe": study.base.recipe,
        "seeds": list(study.seeds),
        "accounting": study.accounting,
        "compute_ratio": study.compute_ratio,
        "costs": {name: cost.to_dict() for name, cost in study.costs.items()},
        "metrics": [result_to_dict(result) for result in summaries],
        "runs": [
            {
                "name": result.folder.name,
                "arm": result.arm,
                "seed": result.seed,
                "num_steps": result.summary["num_steps"],
                "weights_digest": result.summary["weights_digest"],
                "knn_top1": result.summary.get("knn_top1"),
                "knn5shot_top1": result.summary.get("knn5shot_top1"),
                "chosen_iou_mean": result.summary.get("chosen_iou_mean"),
                "other_iou_mean": result.summary.get("other_iou_mean"),
                "num_collapse_warnings": result.summary.get("num_collapse_warnings"),
                "problems": result.summary.get("problems", []),
                "curve": [
                    {"step": p.step, "epoch": p.epoch, "compute": p.compute, "values": p.values} for p in result.curve
                ],
            }
            for result in results
        ],
        "selection": {arm: analysis.to_dict() for arm, analysis in analyses.items()},
        "settings": flatten(config_to_dict(study.base)),
    }


def _page(
    study: Study,
    results: Sequence[RunResult],
    summaries: Sequence[MetricResult],
    analyses: dict[str, SelectionAnalysis],
    sentence: str,
    figures: Sequence[Path],
) -> str:
    drawn = {path.name: path for path in figures}
    comparison = [name for name in ("result.png", "knn_over_epochs.png", "knn_over_compute.png") if name in drawn]
    selection = [name for name in drawn if name not in comparison]
    warned = [r for r in results if r.summary.get("num_collapse_warnings")]
    parts = [
        f"<h1>Hard views against random views: {_text(study.base.recipe)}</h1>",
        f'<p class="result">{_text(sentence)}</p>',
        *(f"<p>{_text(describe_result(study, result))}</p>" for result in summaries[1:]),
        *(
            f'<p class="warning">The watch saw a collapse in {len(warned)} run(s): '
            f"{_text(', '.join(r.folder.name for r in warned))}.</p>"
            for _ in range(bool(warned))
        ),
        *(f'<p class="warning">{_text(problem)}</p>' for problem in _problems(results)),
        *(_metric_table(result) for result in summaries),
        *(_figure(drawn[name]) for name in comparison),
        "<h2>What it costs</h2>",
        _cost_table(study),
        "<h2>What was chosen</h2>",
        _selection_table(analyses),
        *(_figure(drawn[name]) for name in selection),
        "<h2>How it was done</h2>",
        _settings(study, results),
    ]
    return _PAGE.format(title=_text(study.name), body="\n".join(parts))


def _metric_table(result: MetricResult) -> str:
    seeds = list(result.arms[0].by_seed)
    rows = [
        [
            arm.arm,
            arm.title,
            f"<b>{100 * arm.mean:.2f}</b>",
            "" if arm.std is None else f"{100 * arm.std:.2f}",
            *(f"{100 * arm.by_seed[seed]:.2f}" for seed in seeds),
        ]
        for arm in result.arms
    ]
    rows += [[name, "", f"{100 * value:.2f}", "", *("" for _ in seeds)] for name, value in result.references.items()]
    head = ["arm", "trained on", "mean, %", "std", *(f"seed {seed}" for seed in seeds)]
    differences = [
        [d.question, _text(describe_difference(d)), "" if d.test is None else f"{d.test.p_value:.3f}", d.verdict]
        for d in result.differences
    ]
    return (
        f"<h2>{_text(result.title)}</h2>"
        + _table(head, rows)
        + _table(["question", "mean difference", "p", "what may be said"], differences)
    )


def _cost_table(study: Study) -> str:
    rows = []
    runs = {run.arm.name: run for run in study.runs()}
    for arm in study.arms:
        priced = VANILLA if arm.name == VANILLA_LONG else arm.name
        cost, vanilla = study.costs[priced], study.costs[VANILLA]
        images = study.base.images_per_rank
        rows.append(
            [
                arm.name,
                str(runs[arm.name].num_steps),
                f"{cost.step_seconds:.3f}",
                f"{cost.step_seconds / vanilla.step_seconds:.2f}",
                f"{cost.counted_operations / vanilla.counted_operations:.2f}",
                f"{study.ratio_of(priced) * runs[arm.name].num_steps / study.num_steps:.2f}",
                f"{cost.forwards_per_image:.1f}",
                f"{cost.views_per_image:.1f}",
                f"{1000 * cost.render_cpu_seconds / images:.2f}",
                f"{cost.memory_bytes / 2**20:.0f}",
            ]
        )
    head = [
        "arm",
        "steps",
        "step, s",
        "step / random step, measured",
        "the same, counted operations",
        f"run / random run ({study.accounting})",
        "views forwarded per image",
        "views rendered per image",
        "rendering, CPU ms per image",
        "trainer's memory, MiB (estimate)",
    ]
    return _table(head, rows) + (
        "<p>The step's seconds are CPU time of the trainer (GPU: device time), measured once before the comparison, the "
        "arms by turns in one process; the wall time of the runs is not used. Rendering is not part of the compute: view "
        "workers do it, on machines without a GPU.</p>"
    )


def _selection_table(analyses: dict[str, SelectionAnalysis]) -> str:
    if not analyses:
        return "<p>No choices were logged (tracking.selection_images_per_epoch=0, or no arm chooses).</p>"
    head = [
        "arm",
        "period",
        "IoU chosen",
        "IoU others",
        "least-overlap share",
        "chance",
        "colour distance chosen",
        "others",
    ]
    rows = []
    for arm, analysis in analyses.items():
        for title, period in (("first epoch", analysis.per_epoch[0]), ("last third", analysis.last_third)):
            iou, color = period.measures["iou"], period.measures["color_distance"]
            rows.append(
                [
                    arm,
                    title,
                    f"{iou.chosen:.3f}",
                    f"{iou.other:.3f}",
                    f"{period.min_iou_share:.3f}",
                    f"{analysis.chance:.3f}",
                    f"{color.chosen:.3f}",
                    f"{color.other:.3f}",
                ]
            )
    rows.append(list(_AUTHORS_ROW))
    return _table(head, rows) + (
        "<p>First seed. The authors' row: SimSiam, ResNet-50, ImageNet, 4 views. IoU is the overlap of the two crops in "
        "the original image; chance is one over the number of pairs.</p>"
    )


def _settings(study: Study, results: Sequence[RunResult]) -> str:
    values = "\n".join(f"{name} = {value}" for name, value in flatten(config_to_dict(study.base)).items())
    runs = _table(
        ["run", "steps", "weights (SHA-256)"],
        [[r.folder.name, str(r.summary["num_steps"]), r.summary["weights_digest"][:16]] for r in results],
    )
    return (
        "<p>Every arm of a seed starts from the same weights and sees the same images in the same order; random views "
        "are candidates 0 and 1 of the hard run. k-NN: cosine similarity, votes weighted by exp(similarity / 0.07), final "
        "weights, held-out images; nothing was selected on them. Intervals: Student's t over paired seeds; they cover the "
        "seeds, not the choice of test images or data set.</p>"
        f"{runs}<details><summary>all settings</summary><pre>{_text(values)}</pre></details>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    text = _text(_FIGURE_TEXTS.get(path.name, ""))
    return f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}"><figcaption>{text}</figcaption></figure>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
.result {{ font-size: 1.15rem; border-left: 4px solid #c1440e; padding: .4rem 0 .4rem 1rem; }}
.warning {{ color: #a00; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: .8rem 0; font-size: .86rem; }}
th, td {{ text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: bottom; }}
td {{ font-variant-numeric: tabular-nums; }}
figure {{ margin: 1.4rem 0; }} img {{ max-width: 100%; }}
figcaption {{ color: #555; font-size: .86rem; }}
pre {{ font-size: .78rem; overflow-x: auto; }}
</style></head><body>
{body}
</body></html>
"""
