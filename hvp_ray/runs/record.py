"""Read, compare and write config.json, the record of a run."""

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hvp_ray.config import RendererName, RunConfig
from hvp_ray.data.dataset import Dataset, open_dataset
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.files import place_in, read_file, write_file
from hvp_ray.identity import (
    ACCEPTED_VERSIONS,
    VERSIONS,
    Identity,
    Resolved,
    file_digest,
    identity_of,
    recorded_difference,
    run_record,
)
from hvp_ray.local_cache import local_weights
from hvp_ray.resolved_run import names_left_to_auto, renderer_of
from hvp_ray.runs.find import find_run, read_config
from hvp_ray.runs.initial_run import digest_of_initial_run
from hvp_ray.runs.location import output_location, with_absolute_paths
from hvp_ray.runs.render_sample import RenderedSample
from hvp_ray.runs.versions import OtherVersions, check_versions, with_recorded_versions

logger = logging.getLogger(__name__)

_PAUSES_SECONDS = (1.0,)
"""Retry delays for a bucket, short because the user is waiting."""


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


def summary_of(config: RunConfig, identity: Identity) -> dict[str, Any] | None:
    """Return the summary of the finished run of this name if config.json records this identity, else None.

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
            f"{_lines(difference)}\nUse its settings to get its result, or another --run.name to train with yours"
        )
    return _parse_summary(run, content)


def _parse_summary(run: str, content: bytes) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise CheckpointError(
            f"{place_in(run, 'summary.json')} is damaged ({error}); delete it, and start again to evaluate the run again"
        ) from error
    return summary


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownRun:
    """Content of config.json in a run's folder."""

    identity: Identity
    """The identity that the run keeps: that of its start."""
    record: Mapping[str, Any]
    """Content of config.json. Empty: the run is new."""
    others: OtherVersions | None
    """Versions of libraries that differ from those of its start. None: all versions are equal."""


def check_record(
    run: str,
    config: RunConfig,
    identity: Identity,
    render: Callable[[], RenderedSample],
    *,
    is_writer: bool,
    may_accept: bool,
) -> KnownRun:
    """Compare the run with config.json in its folder (path or URI). Only the writer refuses it."""
    path = place_in(run, "config.json")
    content = _read(path)
    if is_writer and content is None and _read(place_in(run, "summary.json")) is not None:
        raise _no_record(run)
    if is_writer and content is not None and not config.run.resume:
        raise ConfigError(f"the run {run} exists, and run.resume=False; choose another run.name, or resume it")
    if content is None:
        return KnownRun(identity=identity, record={}, others=None)
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
            return KnownRun(identity=with_recorded_versions(identity, record), record=record, others=others)
    if difference and is_writer:
        raise _refusal(run, difference, others)
    return KnownRun(identity=identity, record=record, others=None)


def _refusal(run: str, difference: Sequence[str], others: OtherVersions | None) -> CheckpointError:
    if others is not None:
        return CheckpointError(
            f"the run {run} cannot be resumed with other versions of libraries; equal bits could not be promised. "
            f"What differs (its value -> yours):\n  {_lines(difference)}\n{others.finding} Install its versions; or give "
            f"--run.accept_versions True to resume it with yours, and equal bits are no longer promised"
        )
    difference = [line for line in difference if not line.startswith(f"{ACCEPTED_VERSIONS}:")] or difference
    advice = "Use its settings, or another --run.name"
    if any(line.startswith("training data:") for line in difference):
        advice += ". If data.source names the same place, restore missing files and remove new ones"
    return CheckpointError(
        f"the run {run} cannot be resumed with other settings; its result would not be that of one run. "
        f"What differs (its value -> yours):\n  {_lines(difference)}\n{advice}"
    )


def write_record(
    run: str, config: RunConfig, known: KnownRun, render: Callable[[], RenderedSample], commit: str | None
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
        f"config.json, or use another --run.name"
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
