"""The model card: README.md with recipe, data, metrics, licence, and code that loads the encoder."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCard, ModelCardData

import hvp_ray
from hvp_ray.config import RunConfig
from hvp_ray.export.formats import Format
from hvp_ray.export.trained_encoder import TrainedEncoder
from hvp_ray.files import is_uri
from hvp_ray.tracking.metrics_table import SUMMARY

ATTENTION = "attention.png"
_RESULTS = (
    "knn_top1",
    "knn_top1_untrained",
    "knn_top1_pixels",
    "knn5shot_top1",
    "knn5shot_top1_untrained",
    "knn5shot_top1_pixels",
    "num_knn_training_images",
    "num_knn_test_images",
    "loss_first",
    "loss_last",
    "chosen_iou_mean",
    "other_iou_mean",
)
_HUB_DATA_SETS = "hf://datasets/"


@dataclass(frozen=True, kw_only=True, slots=True)
class CardTexts:
    """What a card says besides the run."""

    licence: str
    """Licence of the weights, by its identifier on the Hugging Face hub."""
    repository: str | None
    """OWNER/NAME on the hub. None: the folder is not pushed."""
    check: str
    """Sentence on how the weights were compared with those of the run."""


def write_card(
    folder: Path, encoder: TrainedEncoder, config: RunConfig, summary: dict[str, Any], format: Format, texts: CardTexts
) -> None:
    """Write README.md; it shows attention.png, if that is in the folder."""
    data = ModelCardData(
        license=texts.licence,
        library_name=format.library,
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", "hvp-ray", config.method.name],
        datasets=_hub_data_sets(config.data.source),
    )
    code = 'folder = "."  # the folder of this file'
    if texts.repository is not None:
        code += f', or huggingface_hub.snapshot_download("{texts.repository}")'
    sections = [
        f"# {summary['run_name']}",
        f"An image encoder that was {_trained(config)}: {_network(config)}, {encoder.backbone.num_features} features "
        f"per image. hvp_ray {hvp_ray.__version__} wrote this folder.",
        f"## Load\n\n{format.describe_loading(encoder, code)}\n{texts.check}",
        f"## Training\n\n{_table(('setting', 'value'), _settings(config, summary))}",
        f"## Results\n\n{_results(summary)}",
    ]
    if (folder / ATTENTION).exists():
        sections.append(
            f"## What the encoder sees\n\n![Patch features and attention of the last block]({ATTENTION})\n\nImages of the "
            f"run's data, the first three principal components of their patch features as colours, and the attention of the "
            f"class token in the last block, each map from 0 to its largest value."
        )
    sections.append(f"## Licence\n\nLicence of the weights: {texts.licence}.")
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(folder / "README.md")


def _trained(config: RunConfig) -> str:
    start = _started_from(config)
    return "pretrained without labels" if start is None else f"trained further without labels, from {start}"


def _started_from(config: RunConfig) -> str | None:
    """Return what the weights were before the run; None: random."""
    training, backbone = config.training, config.method.backbone
    if training.initial_run is not None:
        return f"the run {public_name(training.initial_run)}"
    if training.initial_weights is not None:
        return f"the weights {public_name(training.initial_weights)}"
    return f"timm's weights of {backbone.name}" if backbone.pretrained else None


def _network(config: RunConfig) -> str:
    backbone = config.method.backbone
    sizes = {
        name: getattr(backbone, name)
        for name in ("channels", "patch_px", "image_px", "depth", "dim", "num_heads")
        if getattr(backbone, name) is not None
    }
    changes = [f"{name} {value}" for name, value in sizes.items()]
    if backbone.stem == "cifar":
        changes.insert(0, "CIFAR stem")
    if config.data.channels != 3:
        changes.append(f"{config.data.channels} input channel(s)")
    return backbone.name + (f" ({', '.join(changes)})" if changes else "")


def _settings(config: RunConfig, summary: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "recipe", config.recipe
    yield "method", config.method.name
    yield "rule that chose the views", config.selection.rule
    yield "started from", _started_from(config) or "random weights"
    yield "data", f"{summary['num_training_images']:,} images of {public_name(config.data.source)}"
    yield (
        "length",
        f"{summary['num_epochs']:g} epochs, {summary['num_steps']:,} steps of {config.training.images_per_step:,} images",
    )
    yield "resolution of evaluation", f"{config.views.global_views.size_px} px"
    if config.data.intensity_range is not None:
        black, white = config.data.intensity_range
        yield "black and white of images above 8 bits per channel", f"{black:g} and {white:g}"
    if config.data.channels != 3:
        yield "channels of the images", str(config.data.channels)
    yield "seed", str(config.run.seed)


def _results(summary: dict[str, Any]) -> str:
    found = [
        (name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}", SUMMARY[name].meaning)
        for name in _RESULTS
        if (value := summary.get(name)) is not None
    ]
    table = _table(("metric", "value", "meaning"), found)
    if summary.get("knn_top1") is None:
        table += "\n\nThe accuracy was not measured."
    return table


def public_name(source: str) -> str:
    """Return what a card says of a data source: a URI without its query, or the last part of a path."""
    if is_uri(source):
        parts = urlsplit(source)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"
    return Path(source).name or source


def _hub_data_sets(source: str) -> list[str] | None:
    if not source.startswith(_HUB_DATA_SETS):
        return None
    return ["/".join(source.removeprefix(_HUB_DATA_SETS).split("@")[0].split("/")[:2])]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
