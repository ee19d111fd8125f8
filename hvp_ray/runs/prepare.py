"""Prepares a run: resolves its locations, checks its settings, and decides whether an existing run may be resumed."""

import dataclasses
import hashlib
import json
import logging
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hvp_ray.config import RendererName, RunConfig, config_to_dict, flatten
from hvp_ray.credentials import refuse_credentials
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.data.inventory import take_inventory
from hvp_ray.data.listing import MLFLOW_ARTIFACTS
from hvp_ray.errors import CheckpointError, ConfigError, DataError
from hvp_ray.extras import require_extra
from hvp_ray.files import check_writable, is_uri, place_in, read_file, write_file
from hvp_ray.identity import (
    ACCEPTED_VERSIONS,
    VERSIONS,
    Identity,
    Resolved,
    describe_difference,
    file_digest,
    identity_of,
    recorded_difference,
    run_record,
)
from hvp_ray.local_cache import local_weights, with_local_weights
from hvp_ray.methods.backbones import build_backbone
from hvp_ray.methods.initial_weights import load_initial_weights
from hvp_ray.methods.method import Method
from hvp_ray.resolved_run import ResolvedRun, names_left_to_auto, renderer_of
from hvp_ray.runs.channel_statistics import check_channels
from hvp_ray.runs.find import find_run, read_config
from hvp_ray.runs.initial_run import build_method_at_start, digest_of_initial_run, pin_initial_run
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.rank import build_order
from hvp_ray.runs.render_sample import RenderedSample, render_sample
from hvp_ray.runs.storage import working_folder
from hvp_ray.runs.versions import OtherVersions, check_versions, with_recorded_versions
from hvp_ray.tracking.mlflow import MlflowRun, mlflow_is_installed
from hvp_ray.tracking.mlflow_store import store_uri
from hvp_ray.tracking.tensorboard import TensorboardRun
from hvp_ray.tracking.trackers import TrackedRun, check_loggers
from hvp_ray.tracking.wandb import WandbRun
from hvp_ray.training.trainee import build_untrained_method

logger = logging.getLogger(__name__)

SHIPPED_CODE_MARK = "working_dir_files"
"""Part of the path of the temporary copy that `ray job submit --working-dir` makes."""

_PAUSES_SECONDS = (1.0,)
"""Retry delays for a bucket, short because the user is waiting."""


def output_location(config: RunConfig) -> str:
    """Return what holds runs: an absolute path, or a URI.

    Raises:
        ConfigError: a relative path, and the working folder is temporary.
    """
    if config.run.output is None:
        return str(_default_output())
    if is_uri(config.run.output):
        return config.run.output
    path = Path(config.run.output).expanduser()
    if _is_shipped() and not path.is_absolute():
        raise ConfigError(
            f"run.output={config.run.output!r} is relative, but under `ray job submit --working-dir` the working folder "
            f"is a temporary copy ({Path.cwd()}); give an absolute path"
        )
    return str(path.absolute())


def _default_output() -> Path:
    return Path.home() / "hvp_runs" if _is_shipped() else Path.cwd() / "runs"


def _is_shipped() -> bool:
    return SHIPPED_CODE_MARK in Path.cwd().parts


def recorded_settings(config: RunConfig) -> RunConfig | None:
    """Return the recorded settings of the existing run with this name and output. None: the name is new.

    Raises:
        ConfigError: another version wrote them.
    """
    if config.run.name is None:
        return None
    try:
        recorded = read_config(find_run(place_in(output_location(config), config.run.name)))
    except CheckpointError:
        return None
    now = {name: getattr(config.run, name) for name in ("name", "output", "resume", "accept_versions")}
    place = dataclasses.replace(recorded.run, **now)
    return dataclasses.replace(recorded, run=place)


def describe_recorded(recorded: RunConfig) -> str:
    """Return the line that says where the settings of a continued run come from."""
    return f"{recorded.recipe}: the settings are those in config.json of the run {recorded.run.name!r}"


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the config with absolute local paths, because Ray's processes have other working folders."""

    def absolute(location: str | None) -> str | None:
        if location is None or location == "digits" or "://" in location:
            return location
        return str(Path(location).expanduser().absolute())

    data = dataclasses.replace(
        config.data,
        source=absolute(config.data.source) or config.data.source,
        test_source=absolute(config.data.test_source),
    )
    training = dataclasses.replace(
        config.training,
        initial_weights=absolute(config.training.initial_weights),
        initial_run=absolute(config.training.initial_run),
    )
    return dataclasses.replace(config, data=data, training=training)


def for_all_nodes(config: RunConfig) -> RunConfig:
    """Return the config with the output, and the server of MLflow, that this process's folder and environment name."""
    server, tracking = os.environ.get("MLFLOW_TRACKING_URI"), config.tracking
    if tracking.uri == "auto" and server:
        refuse_credentials("MLFLOW_TRACKING_URI", server)
        tracking = dataclasses.replace(tracking, uri=server)
    run = dataclasses.replace(config.run, output=output_location(config))
    return dataclasses.replace(config, run=run, tracking=tracking)


def check_before_start(config: RunConfig, dataset: Dataset | None = None) -> Dataset:
    """Check images, network and output folder before anything starts; return the opened data.

    Raises:
        ConfigError: the output folder or bucket cannot be written, the network cannot be built, or a tracker's package is
            missing.
        CheckpointError: the initial weights do not fit.
        DataError: the data cannot be used, or has fewer images than one step needs.
    """
    location = output_location(config)
    _check_trackers(config)
    dataset = _open_checked(config, dataset)
    _check_view_sizes(config, build_untrained_method(with_local_weights(config)))
    if is_uri(location):
        check_writable(location, option="run.output")
        return dataset
    output = Path(location)
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.output={str(output)!r} cannot be written ({existing} is not a writable folder); give another"
        )
    return dataset


def describe_initial_weights(config: RunConfig) -> tuple[str, ...]:
    """Return a line on the weights that a run starts from; none if they are random.

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


def _open_checked(config: RunConfig, dataset: Dataset | None = None) -> Dataset:
    dataset = dataset or open_dataset(config.data)
    if not len(dataset.training_ids):
        raise DataError("no images are left for training; lower data.test_fraction or use more images")
    check_channels(config, dataset)
    build_order(config, dataset)
    return dataset


def finished_summary(config: RunConfig) -> dict[str, Any] | None:
    """Return the summary of the run of this name; None: it has not finished, or the name is new.

    Nothing is computed again, so versions of libraries and what `auto` resolves to here may differ from the run's.

    Raises:
        ConfigError: the output folder or bucket cannot be read.
        CheckpointError: the run of this name was trained with other settings or on other data, or has no config.json.
        DataError: the data, which has to be the run's, cannot be opened.
    """
    if config.run.name is None or not config.run.resume:
        return None
    run = place_in(output_location(config), config.run.name)
    content = _read(place_in(run, "summary.json"))
    if content is None:
        return None
    if _read(place_in(run, "config.json")) is None:
        raise _no_record(run)
    config = with_absolute_paths(config)
    resolved = resolve(
        config, open_dataset(config.data), renderer=renderer_of(config.cluster), device=config.cluster.device
    )
    chosen = names_left_to_auto(config.cluster)
    ignored = (*VERSIONS, ACCEPTED_VERSIONS, *chosen)
    difference = difference_from_record(run, config, identity_of(config, resolved), ignored=ignored)
    if difference:
        raise CheckpointError(
            f"the run {run} has finished with other settings. What differs (its value -> yours):\n  "
            f"{_lines(difference)}\nTake its settings to see its result, or another --run.name to train with yours"
        )
    return _parse_summary(run, content)


def summary_of(config: RunConfig, identity: Identity) -> dict[str, Any] | None:
    """Return the summary of the run of this name if it has finished with this identity, which config.json tells; else None.

    Raises:
        ConfigError: the output folder or bucket cannot be read.
        CheckpointError: summary.json or config.json is damaged, or config.json is of a version that recorded less.
    """
    assert config.run.name is not None
    run = place_in(output_location(config), config.run.name)
    content = _read(place_in(run, "summary.json"))
    if content is None or difference_from_record(run, config, identity) != []:
        return None
    return _parse_summary(run, content)


def _parse_summary(run: str, content: bytes) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise CheckpointError(
            f"{place_in(run, 'summary.json')} is damaged ({error}); delete it, and start again to evaluate the run again"
        ) from error
    return summary


def difference_from_record(
    run: str, config: RunConfig, identity: Identity, *, ignored: Collection[str] = ()
) -> list[str] | None:
    """Return how the run in a folder (path or URI) differs from this one; empty: it is this one; None: there is no run.

    Parts of the identity whose names are `ignored` need not be equal.

    Raises:
        ConfigError: config.json cannot be read.
        CheckpointError: config.json is damaged, or of a version that recorded less.
    """
    path = place_in(run, "config.json")
    content = _read(path)
    return None if content is None else recorded_difference(content, config, identity, path=path, ignored=ignored)


def resolve(config: RunConfig, dataset: Dataset, *, renderer: RendererName, device: str) -> Resolved:
    """Return what the settings of a run resolve to; `device` is cpu or cuda.

    Raises:
        CheckpointError: the initial weights do not exist.
    """
    weights, run = config.training.initial_weights, config.training.initial_run
    digest = None if weights is None else file_digest(local_weights(weights))
    return Resolved(
        renderer=renderer,
        device=device,
        training_data=dataset.training_parts(config.data),
        test_data=dataset.test_parts(),
        initial_weights=digest if run is None else digest_of_initial_run(run),
        torch_version=torch.__version__,
    )


def prepare_run(
    config: RunConfig,
    resolved: ResolvedRun,
    *,
    is_writer: bool = True,
    planned: Identity | None = None,
    dataset: Dataset | None = None,
    token: str | None = None,
) -> RunJob:
    """Create the folder of a new run, or check that an existing one may be resumed.

    Args:
        config: the run.
        resolved: values in place of its `auto` settings.
        is_writer: False on ranks that only read what another one prepared.
        planned: the identity that the run must have, versions of libraries included. None: any.
        dataset: the opened data of the run. None: it is opened.
        token: of the job that this is an attempt of, see `RunJob.token`. None: a new job.

    Raises:
        ConfigError: the folder cannot be written, a tracker's package is missing, or the run exists and may not be resumed.
        DataError: the data cannot be used.
        CheckpointError: the run is not the planned one, or the run of this name differs from it in its identity or
            evaluation (the message has the difference). Or its folder has a summary.json but no config.json.
    """
    _check_predictor_delay(config, resolved)
    _check_trackers(config)
    config = pin_initial_run(config)
    dataset = _open_checked(config, dataset)
    result = resolve(config, dataset, renderer=resolved.renderer, device=resolved.device)
    fingerprint = result.training_data["training data"]
    identity = identity_of(config, result)
    if planned is not None:
        _check_planned(config, planned, identity)
    output = output_location(config)
    name = config.run.name or draw_run_name(config)
    location = place_in(output, name)
    commit = git_commit(Path(__file__))
    render = partial(
        render_sample,
        config,
        dataset,
        build_order(config, dataset),
        resolved.renderer,
        search_crashing=resolved.num_view_workers > 0,  # without view workers trainers decode unprotected anyway
    )
    known = _check_record(location, config, identity, render, is_writer=is_writer, may_accept=planned is None)
    if is_writer:
        _write_record(location, config, known, render, commit)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    tags = {
        "renderer": resolved.renderer,
        "device": resolved.device,
        "data_fingerprint": fingerprint,
        "run_identity": known.identity.digest,
        "mlflow.note.content": f"{config.recipe}, rule {config.selection.rule}, seed {config.run.seed}. Folder: {location}",
    }
    if commit is not None:
        tags["git_commit"] = commit
    return RunJob(
        config=config,
        token=token or secrets.token_hex(8),
        run_name=name,
        run_dir=working_folder(location) if is_uri(location) else Path(location),
        run_uri=location if is_uri(location) else None,
        run_identity=known.identity.digest,
        resolved=resolved,
        trackers=_describe_for_trackers(config, name, location, fingerprint, tags),
        data_fingerprint=fingerprint,
        test_data=result.test_data["test data"],
        inventory=take_inventory(dataset, config.data) if is_writer else None,
        other_versions=known.others,
    )


def _check_trackers(config: RunConfig) -> None:
    """Check that the packages of all trackers of the run are installed."""
    check_loggers(config.tracking.loggers)
    if mlflow_location(config, local_output(config))[0] is not None and not mlflow_is_installed():
        require_extra("mlflow", extra="mlflow", purpose="tracking.uri")


def _check_predictor_delay(config: RunConfig, resolved: ResolvedRun) -> None:
    """Check that no step is requested before the probes that its proposal uses are learned from."""
    delay, in_flight = config.selection.predictor_delay, resolved.batches_in_flight
    if config.selection.rule == "predicted" and in_flight >= delay:
        raise ConfigError(
            f"selection.predictor_delay={delay} is not allowed: each trainer prefetches {in_flight} batches, and a step is "
            f"requested before what it needs is learned; set cluster.batches_in_flight={delay - 1} or less, or a longer delay"
        )


def _check_planned(config: RunConfig, planned: Identity, identity: Identity) -> None:
    if planned != identity:
        before, now = ({**parts.weights, **parts.evaluation} for parts in (planned, identity))
        raise CheckpointError(
            f"the run {config.run.name} would not be the planned one. Restore what changed (planned -> now): "
            f"{'; '.join(describe_difference(before, now, {}, {}))}"
        )


def _describe_for_trackers(
    config: RunConfig, name: str, location: str, fingerprint: str, tags: dict[str, str]
) -> tuple[TrackedRun, ...]:
    params, tracking = flatten(config_to_dict(config)), config.tracking
    runs: list[TrackedRun] = []
    uri, artifact_root = mlflow_location(config, local_output(config))
    if uri is not None:
        of_config = {
            "recipe": config.recipe,
            "method": config.method.name,
            "selection_rule": config.selection.rule,
            "seed": str(config.run.seed),
            "comparison": tracking.comparison,
            "arm": tracking.arm,
        }
        runs.append(
            MlflowRun(
                uri=uri,
                experiment=tracking.experiment,
                artifact_root=artifact_root,
                run_name=name,
                params=params,
                tags=tags | {tag: value for tag, value in of_config.items() if value is not None},
                dataset_name=Path(config.data.source).name,
                dataset_source=config.data.source,
                dataset_digest=fingerprint,
            )
        )
    if "tensorboard" in tracking.loggers:
        runs.append(TensorboardRun())
    if "wandb" in tracking.loggers:
        runs.append(
            WandbRun(
                project=tracking.experiment,
                run_id=hashlib.sha256(f"{location}\n{tags['run_identity']}".encode()).hexdigest()[:16],
                run_name=name,
                group=tracking.comparison,
                job_type=tracking.arm,
                config=params | tags,
            )
        )
    return tuple(runs)


def draw_run_name(config: RunConfig) -> str:
    """Return a name that no other run has."""
    recipe = config.recipe.replace(":", "-")  # a user's recipe is module:function
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def local_output(config: RunConfig) -> Path:
    """Return the default folder of MLflow's SQLite file; for a run on a bucket, that of runs without `run.output`."""
    location = output_location(config)
    return _default_output() if is_uri(location) else Path(location)


def mlflow_location(config: RunConfig, output: Path) -> tuple[str | None, str | None]:
    """Return (tracking URI, artifact folder of a new experiment); (None, None): MLflow is off."""
    match config.tracking.uri:
        case "none":
            return None, None
        case "auto" if os.environ.get("MLFLOW_TRACKING_URI"):
            refuse_credentials("MLFLOW_TRACKING_URI", os.environ["MLFLOW_TRACKING_URI"])
            return os.environ["MLFLOW_TRACKING_URI"], None
        case "auto" if not mlflow_is_installed():
            return None, None
        case "auto":
            return store_uri(output / "mlflow.db"), (output / MLFLOW_ARTIFACTS).as_uri()
        case uri:
            return uri, None


@dataclass(frozen=True, kw_only=True, slots=True)
class _KnownRun:
    """What config.json in a run's folder says of the run."""

    identity: Identity
    """The identity that the run keeps: that of its start."""
    record: Mapping[str, Any]
    """Content of config.json. Empty: the run is new."""
    others: OtherVersions | None
    """Versions of libraries that differ from those of its start. None: none does."""


def _check_record(
    run: str,
    config: RunConfig,
    identity: Identity,
    render: Callable[[], RenderedSample],
    *,
    is_writer: bool,
    may_accept: bool,
) -> _KnownRun:
    """Compare the run with config.json in its folder (path or URI). Only the writer refuses it."""
    path = place_in(run, "config.json")
    content = _read(path)
    if is_writer and content is None and _read(place_in(run, "summary.json")) is not None:
        raise _no_record(run)
    if is_writer and content is not None and not config.run.resume:
        raise ConfigError(f"the run {run} exists, and run.resume=False; choose another run.name, or resume it")
    if content is None:
        return _KnownRun(identity=identity, record={}, others=None)
    difference = recorded_difference(content, config, identity, path=path)
    record, others = json.loads(content), None
    versions = (*VERSIONS, ACCEPTED_VERSIONS)
    if difference and may_accept and not recorded_difference(content, config, identity, path=path, ignored=versions):
        others = check_versions(record, identity, accepts=config.run.accept_versions, render=render)
        if others.is_allowed:
            if is_writer and others.versions:
                logger.warning(
                    "the run %s continues with other versions of libraries (its version -> yours): %s. %s",
                    run,
                    "; ".join(line for line in difference if not line.startswith(ACCEPTED_VERSIONS)),
                    others.finding or "They were accepted before.",
                )
            return _KnownRun(identity=with_recorded_versions(identity, record), record=record, others=others)
    if difference and is_writer:
        raise _refusal(run, difference, others)
    return _KnownRun(identity=identity, record=record, others=None)


def _refusal(run: str, difference: Sequence[str], others: OtherVersions | None) -> CheckpointError:
    if others is not None:
        return CheckpointError(
            f"the run {run} cannot be resumed with other versions of libraries; its result might not be that of one run. "
            f"What differs (its value -> yours):\n  {_lines(difference)}\n{others.finding} Install its versions; or give "
            f"--run.accept_versions True to resume it with yours, and equal bits are no longer promised"
        )
    difference = [line for line in difference if not line.startswith(f"{ACCEPTED_VERSIONS}:")] or difference
    advice = "Take its settings, or another --run.name"
    if any(line.startswith("training data:") for line in difference):
        advice += ". If data.source names the same place, restore missing files and remove new ones"
    return CheckpointError(
        f"the run {run} cannot be resumed with other settings; its result would not be that of one run. "
        f"What differs (its value -> yours):\n  {_lines(difference)}\n{advice}"
    )


def _write_record(
    run: str, config: RunConfig, known: _KnownRun, render: Callable[[], RenderedSample], commit: str | None
) -> None:
    """Write config.json. It keeps the identity and the sample of views that the run began with."""
    rendering = known.record.get("rendering")
    if known.others is None and (rendering is None or rendering.get("sha256") is None):
        rendering = render().to_dict()
    accepted = known.record.get(ACCEPTED_VERSIONS, [])
    content = run_record(config, known.identity) | {"git_commit": commit, "rendering": rendering}
    if accepted:
        content[ACCEPTED_VERSIONS] = accepted
    try:
        write_file(
            place_in(run, "config.json"), (json.dumps(content, indent=1) + "\n").encode(), pauses=_PAUSES_SECONDS
        )
    except OSError as error:
        raise ConfigError(
            f"the run's folder {run} cannot be written: {error.strerror or error}; give another --run.output"
        ) from error


def _no_record(run: str) -> CheckpointError:
    return CheckpointError(
        f"{run} has the summary.json of a finished run but no config.json, so its settings are unknown. Restore its "
        f"config.json, or take another --run.name"
    )


def _lines(difference: Sequence[str]) -> str:
    return "\n  ".join(difference)


def _read(location: str) -> bytes | None:
    try:
        return read_file(location, pauses=_PAUSES_SECONDS)
    except OSError as error:
        raise ConfigError(
            f"{location} cannot be read: {error}; repair the storage, or give another --run.output"
        ) from error


def git_commit(file: Path) -> str | None:
    """Return the commit of the repository that tracks this file, with `-dirty` if the repository has changes.

    None: no repository tracks it. A virtual environment may lie in a repository that does not track its packages.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, timeout=10, check=True)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
