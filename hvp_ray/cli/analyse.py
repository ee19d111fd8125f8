"""Report which pairs a run chose and what makes them hard, beside the numbers of the authors of Hard View Pretraining.

hvp-ray analyse RUN [--json FILE] [--figures FOLDER]

RUN is a run's folder, or its name under runs/. The run must have logged selections; see selection.rule and
tracking.selection_images_per_epoch.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hvp_ray.cli.command_line import exit_status, parse_options, say
from hvp_ray.config.checks import Checked
from hvp_ray.errors import ConfigError
from hvp_ray.launch.environment import prepare_home
from hvp_ray.runs.find import find_run, keep_results
from hvp_ray.tracking.logged_pairs import FEATURES, MEASURES, read_selection_log
from hvp_ray.tracking.selection_analysis import SelectionAnalysis, analyse_selection
from hvp_ray.tracking.selection_models import AUTHORS_FANOVA, ChoiceModel, ScoreModel

_MEASURE_TITLES = {
    "iou": "IoU of the crops",
    "corner_distance": "corner distance / diagonal",
    "color_distance": "colour distance",
    "smaller_area": "smaller crop / image",
    "larger_area": "larger crop / image",
} | {name: f"{name.replace('_', ' ')}, share" for name in MEASURES if name.endswith("_differs")}

_AUTHORS = {
    "first": {
        "iou": ("0.385", "0.477-0.480"),
        "min_iou_share": ("0.325", ""),
        "corner_distance": ("0.19", "0.158"),
        "smaller_area": ("0.35", ""),
        "larger_area": ("0.57", ""),
    },
    "last": {
        "iou": ("0.345-0.355", "0.485-0.49"),
        "min_iou_share": ("0.40-0.435", ""),
        "corner_distance": ("0.204", "0.157"),
        "smaller_area": ("0.33", ""),
        "larger_area": ("0.56", ""),
    },
}
"""Chosen and other pairs, from the figures of automl/hvp (branches barlow-twins, dino-wds, analysis/plots), two seeds."""


def describe_measures(analysis: SelectionAnalysis) -> str:
    """Return the measures of the first epoch and of the last third of the run, beside the authors' numbers."""
    lines = []
    authors = "the authors (SimSiam, ResNet-50, ImageNet, 4 views)"
    for period, key, title in (
        (analysis.per_epoch[0], "first", f"first logged epoch ({analysis.per_epoch[0].first_epoch})"),
        (analysis.last_third, "last", "last third of the logged steps"),
    ):
        steps = f"steps {period.first_step} to {period.last_step}, {period.num_images:,} images"
        lines += [
            f"{title}: {steps}",
            f"  {'':<34} {'this run':^29}   {authors}",
            f"  {'':<34} {'chosen':>9} {'others':>9} {'differ by':>9}   {'chosen':<14} others",
        ]
        for name in MEASURES:
            measure = period.measures[name]
            chosen, others = _AUTHORS[key].get(name, ("", ""))
            row = (
                f"  {_MEASURE_TITLES[name]:<34} {measure.chosen:>9.3f} {measure.other:>9.3f} "
                f"{measure.chosen - measure.other:>+9.3f}   {chosen:<14} {others}"
            )
            lines.append(row.rstrip())
            if name == "iou":
                share, title = period.min_iou_share, "chosen pair is that of least IoU"
                chosen, _ = _AUTHORS[key]["min_iou_share"]
                row = f"  {title:<34} {share:>9.3f} {'chance':>9} {analysis.chance:>9.3f}   {chosen:<14} chance 0.167"
                lines.append(row)
        lines.append("")
    return "\n".join(lines)


def describe_choice_model(model: ChoiceModel) -> str:
    """Return how well the plan predicts the chosen pair."""
    return "\n".join(
        [
            f"which pair is chosen, predicted from the plan ({model.num_held_out:,} images held out)",
            f"  {'':<34} {'this run':>9}   the authors",
            f"  {'choice model':<34} {model.accuracy:>9.3f}   0.41 (boosted trees)",
            f"  {'rule: the pair of least IoU':<34} {model.min_iou_accuracy:>9.3f}   0.40-0.44",
            f"  {'chance':<34} {model.chance:>9.3f}   0.167",
            "",
        ]
    )


def describe_importance(choice: ChoiceModel, score: ScoreModel | None) -> str:
    """Return the effect of each feature of a pair in both models."""
    lines = [
        "which features it is chosen for",
        f"  {'':<22} {'choice model':^23}   {'score of a pair (forest)':^25}   the authors'",
        f"  {'difference of':<22} {'log-odds':>10} {'accuracy':>12}   {'main effect':>12} {'shuffled':>12}   fANOVA",
    ]
    for name in FEATURES:
        chosen = choice.features[name]
        row = f"  {name.removesuffix('_differs').replace('_', ' '):<22} {chosen.coefficient:>+10.2f} "
        row += f"{-chosen.accuracy_lost:>+12.3f}   "
        if score is None:
            row += f"{'-':>12} {'-':>12}   "
        else:
            row += f"{score.features[name].main_effect:>12.3f} {score.features[name].permutation:>12.3f}   "
        lines.append((row + (f"{AUTHORS_FANOVA[name]:.3f}" if name in AUTHORS_FANOVA else "")).rstrip())
    lines += [
        "  (iou, corner distance and area ratio are of the pair itself)",
        "  log-odds     change for one standard deviation more; negative: less of it is chosen",
        "  accuracy     change when this alone is shuffled among the pairs of each image",
        "  main effect  share of the forest's variance, as in fANOVA; shuffled: share of the scores' variance",
    ]
    if score is not None:
        lines.append(f"  the forest explains {score.r2:.1%} of the variance of the scores within images")
    else:
        lines.append("  no forest: the log has no scores that differ, or too few (selection.rule has to score)")
    return "\n".join([*lines, ""])


def describe_analysis(analysis: SelectionAnalysis) -> str:
    """Return the whole analysis as text."""
    left_out = analysis.num_images_left_out
    text = (
        f"run {analysis.run_name}: {analysis.recipe}, rule {analysis.rule}, seed {analysis.seed}; "
        f"{analysis.num_images:,} logged images, {len(analysis.pairs)} pairs of {analysis.num_views} views"
        + (f"; {left_out:,} images with other views or pairs are left out" if left_out else "")
        + f"\n\n{describe_measures(analysis)}\n"
    )
    if analysis.choice_model is None:
        text += "too few images for the models (100 are needed in the last third)\n\n"
    else:
        text += f"{describe_choice_model(analysis.choice_model)}\n"
        text += f"{describe_importance(analysis.choice_model, analysis.score_model)}\n"
    correlation = analysis.iou_score_correlation
    if correlation is not None:
        text += (
            "IoU and score within an image: "
            f"Pearson {correlation.pearson:+.3f}, Spearman {correlation.spearman:+.3f} "
            f"({correlation.num_images:,} images; negative: pairs that overlap less are harder)\n\n"
        )
    return text


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of an analysis."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder or URI of a run, or its name under runs/."""

    json: Path | None = None
    """File of the numbers. None: RUN/selection_analysis.json."""

    figures: Path | None = None
    """Folder of the figures. None: RUN/figures."""


def analyse(options: Options) -> None:
    """Analyse; print and write the results.

    Raises:
        HvpRayError: the run has no log of choices, or the results cannot be written.
    """
    prepare_home()
    run_dir = find_run(options.run, needs=(), folders=("log",))
    analysis = analyse_selection(read_selection_log(run_dir))
    say(describe_analysis(analysis).removesuffix("\n"))
    from hvp_ray.tracking.selection_figures import draw_selection_figures

    json_path = options.json or run_dir / "selection_analysis.json"
    try:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = json_path.with_name(json_path.name + ".part")
        temporary.write_text(json.dumps(analysis.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, json_path)
        figures = draw_selection_figures(options.figures or run_dir / "figures", analysis)
    except OSError as error:
        raise ConfigError(f"the analysis cannot be written: {error}; give --json and --figures") from error
    keep_results(options.run, run_dir, [json_path, *figures])
    say(f"numbers  {json_path}")
    for index, path in enumerate(figures):
        say(f"{'figures' if not index else '':<8} {path}")


def main(arguments: list[str]) -> int:
    """Analyse; return the exit status."""
    return exit_status(
        lambda: analyse(parse_options(Options, arguments, program="hvp-ray analyse", description=__doc__ or ""))
    )
