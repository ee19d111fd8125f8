"""Fit a `<method>-own` recipe to the images and the machine: sample image sizes, and count how many images fit a step."""

import dataclasses
import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hvp_ray.config import RunConfig, config_to_dict, flatten, with_settings
from hvp_ray.costs.memory import estimate_memory
from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.decode import read_size
from hvp_ray.data.order import choose_subset
from hvp_ray.data.source import Source
from hvp_ray.errors import ConfigError, DataError, UnreadableImageError
from hvp_ray.recipes import get_recipe
from hvp_ray.recipes.own import OWN_RECIPES, Circumstances
from hvp_ray.runs.channel_statistics import measure_channels
from hvp_ray.runs.record import describe_recorded, recorded_settings
from hvp_ray.stream.machine import this_machine
from hvp_ray.stream.reading import read_images

NUM_SAMPLED = 64
_LEAST_IMAGES = 16
_USABLE = 0.6
"""Share of the memory that a step may take by the count; a real step takes up to a third more."""

_FITTED = {"training.images_per_step", "training.accumulation_steps"}
_SHOWN = {
    "views.global_views.size_px": "views, px",
    "method.backbone.name": "network",
    "method.backbone.channels": "widths of its stages",
    "method.backbone.patch_px": "patches, px",
    "method.backbone.dim": "width",
    "method.backbone.depth": "blocks",
    "training.epochs": "epochs",
    "training.num_steps": "steps",
    "training.images_per_step": "images per step",
    "training.accumulation_steps": "parts of a step",
    "optimizer.learning_rate_per_256": "learning rate for 256 images",
    "optimizer.layer_decay": "layer-wise decay of the learning rate",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedRecipe:
    """A recipe that was fitted."""

    config: RunConfig
    lines: tuple[str, ...]
    """What was found and chosen, for people."""
    is_recorded: bool = False
    """The settings are those of an existing run."""


def fit_own_recipe(asked: RunConfig, *, given: Collection[str] = ()) -> FittedRecipe:
    """Return the recipe of `asked.recipe` for its images, device and weights; for a run that exists, its settings.

    Args:
        asked: the recipe as it is, with the settings that the user gave. Its data, device and weights are read.
        given: paths of settings that the user gave, besides those that differ from the recipe's.

    Raises:
        DataError: the images cannot be used.
        ConfigError: not even two images fit the memory.
    """
    if (recorded := recorded_settings(asked)) is not None:
        return FittedRecipe(config=recorded, lines=(describe_recorded(recorded),), is_recorded=True)
    dataset = open_dataset(asked.data)
    device, settings = _device_of(asked), _given(asked, given)
    found = Circumstances(
        num_images=len(dataset.training_ids),
        shorter_px=_median_shorter_side(dataset.source, asked),
        size_px=settings.get("views.global_views.size_px"),
        network=settings.get("method.backbone.name"),
        epochs=settings.get("training.epochs"),
        device=device,
        starts_from_weights=(asked.training.initial_weights or asked.training.initial_run) is not None
        or asked.method.backbone.pretrained,
    )
    memory_bytes, memory = _memory_of(device)
    measured: dict[str, Any] = {}
    if asked.data.channels != len(asked.views.mean):
        channels = measure_channels(asked.data, dataset)
        measured = {"views.mean": channels.mean, "views.std": channels.std}
    config = with_settings(OWN_RECIPES[asked.recipe](found), settings | measured)
    if not _FITTED & set(settings):
        config = _with_images_that_fit(config, found, memory_bytes)
    values = flatten(config_to_dict(config))
    start = " from released weights" if found.starts_from_weights else ""
    lines = [
        f"{config.recipe} for {found.num_images:,} images of {found.shorter_px} px (median of the shorter side), on "
        f"{memory}{start}:"
    ]
    hidden = "training.num_steps" if config.training.num_steps is None else "training.epochs"
    lines += [
        f"  {meaning:<40}{values[path]!s:<24}--{path}{' (given)' if path in settings else ''}"
        for path, meaning in _SHOWN.items()
        if path != hidden and values.get(path) is not None
    ]
    if not {"training.epochs", "training.num_steps"} & set(settings):
        lines.append("  For a first look, give --training.epochs 5; the run prints how long it takes.")
    if measured:
        lines.append(f"  measured on {channels.num_images} images: {channels.options()}")
    if config.recipe == "simclr-own":
        lines.append(
            f"  SimCLR contrasts the images of a step: {config.training.images_per_step} of them give "
            f"{2 * config.training.images_per_step - 2} negatives. With few, simsiam-own and dino-own learn better."
        )
    return FittedRecipe(config=config, lines=tuple(lines))


def _given(asked: RunConfig, given: Collection[str]) -> dict[str, Any]:
    """Return the settings that are given or differ from those of the recipe as it is: path -> value."""
    usual = flatten(config_to_dict(get_recipe(asked.recipe)))
    values = flatten(config_to_dict(asked))
    return {path: value for path, value in values.items() if path in given or usual.get(path) != value}


def _device_of(asked: RunConfig) -> Literal["cpu", "cuda"]:
    """Return what the trainers run on, as far as this machine can tell."""
    if asked.cluster.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return asked.cluster.device


def _memory_of(device: str) -> tuple[int, str]:
    """Return a trainer's memory in bytes, and a description of its device."""
    if device == "cpu":
        machine = this_machine()
        return machine.free_bytes // 2, f"{machine.num_cpus} CPU(s) with {machine.free_bytes / 2**30:.0f} GiB free"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, f"a {properties.name} of {properties.total_memory / 2**30:.0f} GiB"
    return 16 * 2**30, "a GPU of assumed 16 GiB (this machine has none)"


def _median_shorter_side(source: Source, asked: RunConfig) -> int:
    sides, reason = [], "there are none"
    for sample_id in choose_subset(source.num_samples, min(NUM_SAMPLED, source.num_samples)).tolist():
        try:
            image = read_images(source, [sample_id]).images[0]
            sides.append(min(read_size(image, max_pixels=asked.data.max_image_pixels, channels=asked.data.channels)))
        except UnreadableImageError as error:
            reason = str(error)
    if not sides:
        raise DataError(f"data.source={asked.data.source!r}: none of {NUM_SAMPLED} images can be read: {reason}")
    return int(statistics.median(sides))


def _with_images_that_fit(config: RunConfig, found: Circumstances, memory_bytes: int) -> RunConfig:
    """Halve the images per step until the data has 16 steps per epoch and the step fits; below 16 images, split it."""
    images, parts = config.training.images_per_step, 1
    while images > _LEAST_IMAGES and images * 16 > found.num_images:
        images //= 2

    def of(images: int, parts: int) -> RunConfig:
        training = dataclasses.replace(config.training, images_per_step=images, accumulation_steps=parts)
        return dataclasses.replace(config, training=training)

    while estimate_memory(of(images, parts)).peak > _USABLE * memory_bytes:
        if images > _LEAST_IMAGES:
            images //= 2
        elif images // parts > 2:
            parts *= 2
        else:
            raise ConfigError(
                f"{config.recipe} does not fit {memory_bytes / 2**30:.1f} GiB with two images at a time; give a smaller "
                f"--method.backbone.name or --views.global_views.size_px"
            )
    return of(images, parts)
