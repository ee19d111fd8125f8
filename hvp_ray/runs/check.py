"""Check images, network, output folder and trackers before anything starts."""

import os
from pathlib import Path

import torch

from hvp_ray.config import RunConfig
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.extras import require_extra
from hvp_ray.files import check_writable, is_uri
from hvp_ray.local_cache import with_local_weights
from hvp_ray.methods.backbones import build_backbone
from hvp_ray.methods.initial_weights import load_initial_weights
from hvp_ray.methods.method import Method
from hvp_ray.runs.channel_statistics import check_channels
from hvp_ray.runs.initial_run import build_method_at_start
from hvp_ray.runs.location import local_output, mlflow_location, output_location
from hvp_ray.runs.rank import build_order
from hvp_ray.tracking.mlflow import mlflow_is_installed
from hvp_ray.tracking.trackers import check_loggers
from hvp_ray.training.trainee import build_untrained_method


def check_before_start(config: RunConfig, dataset: Dataset | None = None) -> Dataset:
    """Check images, network and output folder before anything starts; return the opened data.

    Raises:
        ConfigError: the output folder or bucket cannot be written, the network cannot be built, or a tracker's package is
            missing.
        CheckpointError: the initial weights do not fit.
        DataError: the data cannot be used, or has fewer images than one step needs.
    """
    location = output_location(config)
    check_trackers(config)
    dataset = open_checked(config, dataset)
    _check_view_sizes(config, build_untrained_method(with_local_weights(config)))
    if is_uri(location):
        check_writable(location, option="run.output")
        return dataset
    output = Path(location)
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.output={str(output)!r} cannot be written ({existing} is not a writable folder); give another --run.output"
        )
    return dataset


def describe_initial_weights(config: RunConfig) -> tuple[str, ...]:
    """Describe the initial weights in one line. Return nothing if they are random.

    Raises:
        CheckpointError: they do not fit.
    """
    if config.training.initial_run is not None:
        num_tensors = len(build_method_at_start(config).state_dict())
        return (f"initial run: all {num_tensors} tensors of {config.training.initial_run} are loaded",)
    weights = with_local_weights(config).training.initial_weights
    if weights is None:
        return ()
    fit = load_initial_weights(build_backbone(config.encoder), weights)
    return (f"initial weights: {fit.describe()}",)


def _check_view_sizes(config: RunConfig, method: Method) -> None:
    """Check that the encoder accepts views of all sizes, by forwarding an empty image of each."""
    views, selection, patch_px = config.views, config.selection, method.patch_px
    sizes = {
        "views.global_views.size_px": views.global_views.size_px,
        "views.local_views.size_px": None if views.local_views is None else views.local_views.size_px,
        "selection.scoring_resolution_px": selection.scoring_resolution_px,
    }
    for path, size_px in sizes.items():
        if size_px is not None and size_px % patch_px:
            raise ConfigError(f"{path}={size_px} is not allowed: expected a multiple of the patch size, {patch_px} px")
        if size_px is not None:
            try:
                with torch.no_grad():
                    method.encoder.eval()(torch.zeros(1, config.data.channels, size_px, size_px))
            except (AssertionError, RuntimeError) as error:
                name = config.method.backbone.name
                raise ConfigError(f"{path}={size_px} is not allowed: {name} rejects it: {error}") from error
    if views.masks is not None and views.masks.patch_px != patch_px:
        raise ConfigError(
            f"views.masks.patch_px={views.masks.patch_px} is not allowed: the patches of the encoder are {patch_px} px wide"
        )


def open_checked(config: RunConfig, dataset: Dataset | None = None) -> Dataset:
    """Return the opened data of a run.

    Raises:
        ConfigError: mean and standard deviation of the channels are missing.
        DataError: the data cannot be used, or has fewer images than one step needs.
    """
    dataset = dataset or open_dataset(config.data)
    if not len(dataset.training_ids):
        raise DataError("no images are left for training; lower data.test_fraction or use more images")
    check_channels(config, dataset)
    build_order(config, dataset)
    return dataset


def check_trackers(config: RunConfig) -> None:
    """Check that the packages of all trackers of the run are installed."""
    check_loggers(config.tracking.loggers)
    if mlflow_location(config, local_output(config))[0] is not None and not mlflow_is_installed():
        require_extra("mlflow", extra="mlflow", purpose="tracking.uri")
