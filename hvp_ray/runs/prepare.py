"""Prepares a run: creates its folder, or decides that the run in it may be resumed."""

import dataclasses
import hashlib
import secrets
import subprocess
from functools import partial
from pathlib import Path

from hvp_ray.config import RunConfig, config_to_dict, flatten
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.inventory import take_inventory
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.files import is_uri, place_in
from hvp_ray.identity import (
    Identity,
    describe_difference,
    identity_of,
)
from hvp_ray.resolved_run import ResolvedRun
from hvp_ray.runs.check import check_trackers, open_checked
from hvp_ray.runs.initial_run import pin_initial_run
from hvp_ray.runs.job import RunJob
from hvp_ray.runs.location import draw_run_name, local_output, mlflow_location, output_location
from hvp_ray.runs.rank import build_order
from hvp_ray.runs.record import check_record, resolve, write_record
from hvp_ray.runs.render_sample import render_sample
from hvp_ray.runs.storage import working_folder
from hvp_ray.tracking.mlflow import MlflowRun
from hvp_ray.tracking.tensorboard import TensorboardRun
from hvp_ray.tracking.trackers import TrackedRun
from hvp_ray.tracking.wandb import WandbRun


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
        token: token of the job that this attempt belongs to (`RunJob.token`). None: start a new job.

    Raises:
        ConfigError: the folder cannot be written, a tracker's package is missing, or the run exists and may not be resumed.
        DataError: the data cannot be used.
        CheckpointError: the run is not the planned one, or the run of this name differs from it in its identity or
            evaluation (the message has the difference). Or its folder has a summary.json but no config.json.
    """
    _check_predictor_delay(config, resolved)
    check_trackers(config)
    config = pin_initial_run(config)
    dataset = open_checked(config, dataset)
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
    known = check_record(location, config, identity, render, is_writer=is_writer, may_accept=planned is None)
    if is_writer:
        write_record(location, config, known, render, commit)
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


def _check_predictor_delay(config: RunConfig, resolved: ResolvedRun) -> None:
    """Check that no batch is requested before the coefficients of its proposal exist."""
    delay, in_flight = config.selection.predictor_delay, resolved.batches_in_flight
    if config.selection.rule == "predicted" and in_flight >= delay:
        raise ConfigError(
            f"selection.predictor_delay={delay} is not allowed: expected more than the {in_flight} batches that each trainer "
            f"prefetches; set cluster.batches_in_flight={delay - 1} or less, or a longer delay"
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
