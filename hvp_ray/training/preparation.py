"""Before a run starts: its folder, its identity, and whether it may go on."""

import dataclasses
import json
import os
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from hvp_ray.config import RendererName, RunConfig, config_to_dict
from hvp_ray.credentials import refuse_credentials
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.data.inventory import take_inventory
from hvp_ray.data.listing import MLFLOW_ARTIFACTS
from hvp_ray.errors import CheckpointError, ConfigError, DataError
from hvp_ray.identity import describe_difference, identity_digest, identity_parts
from hvp_ray.methods.method import Method
from hvp_ray.remote_files import check_writable, is_uri, place_in, read_file, write_file
from hvp_ray.tracking.mlflow_store import store_uri
from hvp_ray.training.rank import RunJob, build_order
from hvp_ray.training.run_storage import local_weights, working_folder
from hvp_ray.training.setup import build_untrained_method

SHIPPED_CODE_MARK = "working_dir_files"
"""Part of the path of the temporary copy that `ray job submit --working-dir` makes."""

_PAUSES_SECONDS = (1.0,)
"""Between attempts at a bucket: somebody waits for the answer."""


def output_location(config: RunConfig) -> str:
    """Return what holds runs: an absolute path, or a URI.

    Raises:
        ConfigError: a relative path where the working folder is temporary.
    """
    if config.run.output is not None and is_uri(config.run.output):
        return config.run.output
    return str(output_folder(config))


def output_folder(config: RunConfig) -> Path:
    """Return the folder that holds runs, absolute.

    Raises:
        ConfigError: a URI, or a relative path where the working folder is temporary.
    """
    is_shipped = SHIPPED_CODE_MARK in Path.cwd().parts
    if config.run.output is None:
        return Path.home() / "hvp_runs" if is_shipped else Path.cwd() / "runs"
    if is_uri(config.run.output):
        raise ConfigError(
            f"run.output={config.run.output!r}: a comparison needs a folder, which all its runs see; single runs "
            f"(pretrain.py) can go to a bucket"
        )
    path = Path(config.run.output).expanduser()
    if is_shipped and not path.is_absolute():
        raise ConfigError(
            f"run.output={config.run.output!r} is relative, but under `ray job submit --working-dir` the working folder "
            f"is a temporary copy ({Path.cwd()}); give an absolute path"
        )
    return path.absolute()


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with its local paths made absolute: Ray's processes have other working folders."""

    def absolute(location: str | None) -> str | None:
        if location is None or location == "digits" or "://" in location:
            return location
        return str(Path(location).expanduser().absolute())

    data = dataclasses.replace(
        config.data,
        source=absolute(config.data.source) or config.data.source,
        test_source=absolute(config.data.test_source),
    )
    weights = absolute(config.training.initial_weights)
    training = dataclasses.replace(config.training, initial_weights=weights)
    return dataclasses.replace(config, data=data, training=training)


def check_before_start(config: RunConfig) -> None:
    """Find what is wrong with data, network and output folder before anything is started.

    Raises:
        ConfigError: the output folder or bucket cannot be written, or the network cannot be built.
        CheckpointError: the initial weights do not fit.
        DataError: the data cannot be used, or has fewer images than one step needs.
    """
    location = output_location(config)
    _open_checked(config)
    _check_view_sizes(config, build_untrained_method(config))
    if is_uri(location):
        check_writable(location, option="run.output")
        return
    output = Path(location)
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.output={str(output)!r} cannot be written ({existing} is not a writable folder); give another"
        )


def _check_view_sizes(config: RunConfig, method: Method) -> None:
    """Check that the encoder takes views of all sizes, by forwarding an empty image of each."""
    views, selection, patch_px = config.views, config.selection, method.patch_px
    sizes = {
        "views.global_views.size_px": views.global_views.size_px,
        "views.local_views.size_px": None if views.local_views is None else views.local_views.size_px,
        "selection.scoring_resolution_px": selection.scoring_resolution_px,
    }
    for path, size_px in sizes.items():
        if size_px is not None and size_px % patch_px:
            raise ConfigError(f"{path}={size_px} is not allowed: a multiple of the patches of {patch_px} px")
        if size_px is not None:
            try:
                with torch.no_grad():
                    method.encoder.eval()(torch.zeros(1, 3, size_px, size_px))
            except (AssertionError, RuntimeError) as error:
                name = config.method.backbone.name
                raise ConfigError(f"{path}={size_px} is not allowed: {name} does not take it: {error}") from error
    if views.masks is not None and views.masks.patch_px != patch_px:
        raise ConfigError(
            f"views.masks.patch_px={views.masks.patch_px} is not allowed: the encoder's patches have {patch_px} px"
        )


def _open_checked(config: RunConfig) -> Dataset:
    dataset = open_dataset(config.data)
    if not len(dataset.training_ids):
        raise DataError("no images are left for training; lower data.test_fraction or use more images")
    build_order(config, dataset)
    return dataset


def finished_summary(config: RunConfig) -> dict[str, Any] | None:
    """Return the summary of the run of this name where it has ended; None: it has not, or the name is new.

    Raises:
        ConfigError: the output folder or bucket cannot be read.
    """
    if config.run.name is None:
        return None
    content = _read(place_in(output_location(config), config.run.name, "summary.json"))
    if content is None:
        return None
    summary: dict[str, Any] = json.loads(content)
    return summary


def prepare_run(config: RunConfig, *, renderer: RendererName, device: str, is_writer: bool = True) -> RunJob:
    """Make the folder of a new run, or check that an existing one may go on.

    Args:
        config: the run.
        renderer: resolved renderer.
        device: cpu or cuda.
        is_writer: False on ranks that only read what another one prepared.

    Raises:
        ConfigError: the folder cannot be written, or the run exists and may not be resumed.
        DataError: the data cannot be used.
        CheckpointError: the run of this name has another identity; the message has the difference.
    """
    dataset = _open_checked(config)
    if is_writer and len(dataset.test_ids) and config.tracking.knn_images:
        # Read when the run ends: what is wrong with them is said now.
        dataset.source.load_labels()
        dataset.test_source.load_labels()
    fingerprint = dataset.fingerprint()
    parts = identity_parts(
        _with_local_weights(config),
        renderer=renderer,
        device=device,
        data_fingerprint=fingerprint,
        torch_version=torch.__version__,
    )
    identity = identity_digest(parts)
    output = output_location(config)
    name = config.run.name or draw_run_name(config)
    location = place_in(output, name)
    commit = git_commit(Path(__file__))
    if is_writer:
        _write_or_check(location, config, identity, parts, commit)
    uri, artifact_root = mlflow_location(config, local_output(config))
    tags = {
        "recipe": config.recipe,
        "method": config.method.name,
        "selection_rule": config.selection.rule,
        "seed": str(config.run.seed),
        "renderer": renderer,
        "device": device,
        "data_fingerprint": fingerprint,
        "run_identity": identity,
        "mlflow.note.content": f"{config.recipe}, rule {config.selection.rule}, seed {config.run.seed}. Folder: {location}",
    }
    if commit is not None:
        tags["git_commit"] = commit
    of_comparison = {"comparison": config.tracking.comparison, "arm": config.tracking.arm}
    tags |= {tag: value for tag, value in of_comparison.items() if value is not None}
    return RunJob(
        config=dataclasses.replace(config, run=dataclasses.replace(config.run, name=name)),
        run_name=name,
        run_dir=working_folder(location) if is_uri(location) else Path(location),
        run_uri=location if is_uri(location) else None,
        run_identity=identity,
        renderer=renderer,
        mlflow_uri=uri,
        mlflow_artifact_root=artifact_root,
        tags=tags,
        data_fingerprint=fingerprint,
        inventory=take_inventory(dataset, config.data),
    )


def draw_run_name(config: RunConfig) -> str:
    """Return a name that no other run has."""
    recipe = config.recipe.replace(":", "-")  # a recipe of one's own is module:function
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def local_output(config: RunConfig) -> Path:
    """Return the folder of MLflow's SQLite file by default: of runs on a bucket, where runs without `run.output` would be."""
    if config.run.output is not None and is_uri(config.run.output):
        return output_folder(dataclasses.replace(config, run=dataclasses.replace(config.run, output=None)))
    return output_folder(config)


def _with_local_weights(config: RunConfig) -> RunConfig:
    """Return the config with initial weights behind a URI replaced by their copy here; what counts is their digest."""
    if config.training.initial_weights is None:
        return config
    weights = local_weights(config.training.initial_weights)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, initial_weights=weights))


def mlflow_location(config: RunConfig, output: Path) -> tuple[str | None, str | None]:
    """Return (tracking URI, artifact folder of a new experiment); (None, None): MLflow is off."""
    match config.tracking.uri:
        case "none":
            return None, None
        case "auto" if os.environ.get("MLFLOW_TRACKING_URI"):
            refuse_credentials("MLFLOW_TRACKING_URI", os.environ["MLFLOW_TRACKING_URI"])
            return os.environ["MLFLOW_TRACKING_URI"], None
        case "auto":
            return store_uri(output / "mlflow.db"), (output / MLFLOW_ARTIFACTS).as_uri()
        case uri:
            return uri, None


def _write_or_check(run: str, config: RunConfig, identity: str, parts: dict[str, Any], commit: str | None) -> None:
    """Check what config.json in the run's folder (path or URI) says, and write it."""
    path = place_in(run, "config.json")
    found = _read(path)
    if found is not None:
        if not config.run.resume:
            raise ConfigError(f"the run {run} exists, and run.resume=False; choose another run.name, or resume it")
        before = json.loads(found)
        if before["run_identity"] != identity:
            difference = "\n  ".join(describe_difference(before["identity"], json.loads(json.dumps(parts))))
            raise CheckpointError(
                f"the run {run} cannot be resumed with other settings; its result would not be that of one run. "
                f"What differs (its value -> yours):\n  {difference}\nTake its settings, or another --run.name"
            )
    content = {
        "config": config_to_dict(config),
        "run_identity": identity,
        "identity": parts,
        "git_commit": commit,
    }
    try:
        write_file(path, (json.dumps(content, indent=1) + "\n").encode(), pauses=_PAUSES_SECONDS)
    except OSError as error:
        raise ConfigError(
            f"the run's folder {run} cannot be written: {error.strerror or error}; give another --run.output"
        ) from error


def _read(location: str) -> bytes | None:
    try:
        return read_file(location, pauses=_PAUSES_SECONDS)
    except OSError as error:
        raise ConfigError(
            f"{location} cannot be read: {error}; mend the storage, or give another --run.output"
        ) from error


def git_commit(file: Path) -> str | None:
    """Return the commit of the repository that has this file, with `-dirty` if anything there was changed.

    None: no repository has it. A package in a virtual environment lies in somebody's repository and does not belong to it.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, timeout=10, check=True)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
