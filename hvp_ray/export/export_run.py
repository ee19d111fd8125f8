"""Write the encoder of a finished run in a format: weights, model card, and a comparison with the original."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvp_ray.config import RunConfig
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.evaluation.patch_maps import compute_patch_maps, has_patch_maps
from hvp_ray.export.card import ATTENTION, CardTexts, write_card
from hvp_ray.export.comparison_images import ComparisonImages, load_comparison_images
from hvp_ray.export.formats import FORMATS, Format
from hvp_ray.export.trained_encoder import TrainedEncoder
from hvp_ray.local_cache import BACKBONE
from hvp_ray.methods.backbones import load_exported_backbone
from hvp_ray.tracking.patch_figure import draw_patch_maps
from hvp_ray.views.normalise import normalise_views


def export_run(
    run_dir: Path,
    config: RunConfig,
    summary: dict[str, Any],
    *,
    to: str,
    folder: Path,
    replace: bool = False,
    licence: str,
    repository: str | None = None,
    show_images: bool = False,
) -> str:
    """Write the encoder into `folder`, if features of the written one equal those of the run's on a few images.

    Returns a sentence on this comparison.

    Args:
        run_dir: folder of a finished run, with its encoder.
        config: the run.
        summary: what `summary.json` of the run holds.
        to: name of the format in `FORMATS`.
        folder: folder to write, as a whole or not at all.
        replace: delete the content of the folder first, if there is any; otherwise that is an error.
        licence: licence of the weights, for the model card.
        repository: OWNER/NAME on the Hugging Face hub, for the model card.
        show_images: show images of the run's data on the model card, with attention and patch features.

    Raises:
        CheckpointError: the run has no readable encoder, or the written one has other features.
        ConfigError: the format has no such network, a package is missing, or the folder cannot be written.
    """
    format = FORMATS[to]
    encoder = TrainedEncoder(
        backbone=load_exported_backbone(run_dir / BACKBONE),
        settings=config.encoder,
        views=config.views,
        intensity_range=config.data.intensity_range,
    )
    images = load_comparison_images(config)
    try:
        if not replace and folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"--output {folder} is not empty; give another folder, or delete it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as staging:
            written = Path(staging) / "export"
            written.mkdir()
            format.write(encoder, written)
            check = _compare(encoder, format, written, images)
            if show_images:
                _draw_images(encoder, images, written / ATTENTION)
            texts = CardTexts(licence=licence, repository=repository, check=check)
            write_card(written, encoder, config, summary, format, texts)
            shutil.rmtree(folder, ignore_errors=True)
            written.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}; give --output") from error
    return check


def _compare(encoder: TrainedEncoder, format: Format, folder: Path, images: ComparisonImages) -> str:
    """Return a sentence on the largest difference of features.

    Raises:
        CheckpointError: it is larger than the format allows.
    """
    inputs = normalise_views(torch.from_numpy(images.pixels), encoder.views).contiguous()
    ours = encoder.embed(inputs)
    with torch.no_grad():
        theirs: Tensor = format.load(encoder, folder)(inputs)
    difference = float((ours - theirs).abs().max())
    allowed = format.tolerance * max(1.0, float(ours.abs().max()))
    if not difference <= allowed:  # also if it is not a number
        raise CheckpointError(
            f"nothing was written: on {images.description}, features in {format.library} differ from those of the run by "
            f"{difference:.1e}, and {allowed:.1e} is allowed; please report the network, {encoder.settings.name}"
        )
    result = f"differ from those of the run by at most {difference:.1e}" if difference else "equal those of the run"
    return f"On {images.description}, the features {result}."


def _draw_images(encoder: TrainedEncoder, images: ComparisonImages, path: Path) -> None:
    if not has_patch_maps(encoder.backbone, size_px=encoder.size_px):
        raise ConfigError(
            f"--show-images is not allowed: {encoder.settings.name} has no class token that attends to patches"
        )
    if not images.are_real:
        raise ConfigError(f"--show-images is not allowed: there would be {images.description}")
    maps = compute_patch_maps(encoder.backbone, images.pixels, encoder.views, device=torch.device("cpu"))
    draw_patch_maps(path, images.pixels, maps)
