"""The page of a finished run: its result, curves and pictures, and what to do next, in one HTML file."""

import shlex
from pathlib import Path
from typing import Any

from hvp_ray.config import RunConfig
from hvp_ray.files import write_file
from hvp_ray.identity import flat_values
from hvp_ray.recipes import get_recipe
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.versions import describe_versions
from hvp_ray.tracking.figures import draw_knn_curve
from hvp_ray.tracking.page import render_page
from hvp_ray.tracking.run_log import EVALUATIONS, read_records

PAGE = "report.html"

_CAPTIONS = {
    "loss.png": "Loss on the chosen views, and of the other candidates in the scoring pass. The thin line has every record.",
    "knn.png": "k-NN accuracy of the frozen encoder while it trained. Dotted: with all labels, without this training.",
    "collapse.png": "Standard deviation of the normalised embeddings. It falls to 0 if all images get the same embedding.",
    "teacher.png": "What the teacher's output says about the image. Near 0 it says the same of every image.",
    "overlap.png": "Overlap of the crops of the chosen pair, and of the pairs that were not chosen.",
    "candidate_views.png": "Candidates of some training images, scored with the final weights. The hardest choice is framed.",
    "neighbours.png": "Images that the encoder holds for most similar, with the cosine similarity of their features. The "
    "left column was not trained on, unless the run has no test images. No label was used.",
    "attention.png": "What a Vision Transformer sees in some images: its patch features and its attention.",
}
_SECTIONS = {
    "Curves": ("loss.png", "knn.png", "collapse.png", "teacher.png"),
    "What was chosen": ("candidate_views.png", "overlap.png"),
    "Nearest neighbours": ("neighbours.png",),
    "Inside the encoder": ("attention.png",),
}
_NOT_OF_A_COMMAND = ("run.", "tracking.comparison", "tracking.arm", "method.type", "recipe")
_OF_AN_ARM = ("selection.rule",)


def write_page(job: RunJob, summary: dict[str, Any], problems: list[str]) -> None:
    """Draw the k-NN curve and write report.html into the run's folder.

    Args:
        job: the run; all figures but the k-NN curve are in its folder.
        summary: what is known of the run.
        problems: what failed so far, one sentence each.
    """
    figures = job.run_dir / "figures"
    references = {"before training": "knn_top1_untrained", "raw pixels": "knn_top1_pixels"}
    levels = {title: summary[name] for title, name in references.items() if summary.get(name) is not None}
    draw_knn_curve(figures / "knn.png", list(read_records(job.run_dir, EVALUATIONS)), levels)
    page = render_page(
        "hvp_ray.runs",
        "report.html.jinja",
        _CAPTIONS,
        job=job,
        config=job.config,
        summary=summary,
        versions=describe_versions(summary.get("other_versions")),
        problems=problems,
        sections=_sections(figures),
        commands=next_commands(job.config, job.location, has_labels=summary.get("knn_top1") is not None),
        settings=flat_values(job.config),
    )
    write_file(str(job.run_dir / PAGE), page.encode())


def next_commands(config: RunConfig, location: str, *, has_labels: bool = True) -> dict[str, str]:
    """Return what to do after a run: purpose -> command.

    Args:
        config: the run.
        location: its folder, path or URI.
        has_labels: its images have labels, which evaluations and comparisons need.
    """
    run, options = shlex.quote(location), _options(config)
    compared = _join("hvp-ray compare", config.recipe, *_options(config, leave_out=_OF_AN_ARM))
    commands = {
        "Evaluate the encoder by k-NN and a linear probe": f"hvp-ray evaluate --checkpoint {run} --protocol knn linear",
        "Write the encoder for another library": f"hvp-ray export {run} --to timm",
        "See what made pairs hard": f"hvp-ray analyse {run}",
        "Compare hard with random views on paired seeds": compared,
        "Train on from this encoder, with a new schedule": _join(
            "hvp-ray pretrain", config.recipe, *options, f"--training.initial_weights {run}"
        ),
    }
    if not config.tracking.selection_images_per_epoch:
        commands.pop("See what made pairs hard")
    if not has_labels:
        commands.pop("Compare hard with random views on paired seeds")
        commands.pop("Evaluate the encoder by k-NN and a linear probe")
        labelled = f"hvp-ray evaluate --checkpoint {run} --protocol knn linear --data path/to/labelled/images"
        commands = {"Evaluate the encoder on images with labels, such as class folders": labelled} | commands
    return commands


def _options(config: RunConfig, *, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Return the options that make this run of its recipe."""
    recipe, skipped = flat_values(get_recipe(config.recipe)), (*_NOT_OF_A_COMMAND, *leave_out)
    changed = {name: value for name, value in flat_values(config).items() if recipe.get(name, value) != value}
    for name in ("training.initial_weights", "training.initial_run"):
        changed.pop(name, None)
    return [f"--{name} {_value(value)}" for name, value in changed.items() if not name.startswith(skipped)]


def _value(value: Any) -> str:
    return " ".join(map(_value, value)) if isinstance(value, list) else shlex.quote(str(value))


def _join(program: str, recipe: str, *options: str) -> str:
    """Return a command with one option in each line."""
    return " \\\n    ".join([f"{program} {recipe}", *options])


def _sections(folder: Path) -> dict[str, list[Path]]:
    """Return title -> figures. Those that are not named here come last."""
    found = {path.name: path for path in sorted(folder.glob("*.png"))}
    sections = {title: [found.pop(name) for name in names if name in found] for title, names in _SECTIONS.items()}
    sections["More figures"] = list(found.values())
    return {title: figures for title, figures in sections.items() if figures}
