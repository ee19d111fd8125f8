"""Identity of a run: everything that may change a bit of its weights, and everything that its metrics depend on.

It holds what settings result in, for instance which images are trained on, and not how they are written.
`runs/record.py` resumes a run only under its identity; `comparison/study.py` compares only runs of one identity
apart from arm and seed. `effect_of` classifies every field of the config: a new field needs a line here.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Any

from hvp_ray.config import RendererName, RunConfig, config_to_dict, flatten
from hvp_ray.errors import CheckpointError, first_line


class Effect(Enum):
    """The effect that a field of the config may have."""

    WEIGHTS = auto()
    """A bit of the weights: its value is part of the identity."""
    METRICS = auto()
    """Metrics of the same weights. Its value is part of the evaluation's identity."""
    RESULT = auto()
    """Weights or metrics, through what it results in. The identity holds that (`Resolved`) instead of the value."""
    NOTHING = auto()
    """No number. A comment beside each field gives the reason."""


_EFFECTS: dict[str, Effect] = {
    "recipe": Effect.WEIGHTS,
    "run.name": Effect.NOTHING,  # names a folder
    "run.output": Effect.NOTHING,  # places a folder
    "run.seed": Effect.WEIGHTS,
    "run.resume": Effect.NOTHING,  # False refuses a folder that exists
    "run.accept_versions": Effect.NOTHING,  # the versions are in the identity; the summary says if others were used
    "data.source": Effect.RESULT,
    "data.num_images": Effect.RESULT,
    "data.test_source": Effect.RESULT,
    "data.test_fraction": Effect.RESULT,
    "data.max_unreadable_fraction": Effect.NOTHING,  # ends a run; replacements do not depend on it
    "data.max_image_pixels": Effect.WEIGHTS,
    "data.max_image_mib": Effect.WEIGHTS,
    "data.intensity_range": Effect.WEIGHTS,
    "data.channels": Effect.WEIGHTS,
    "data.shuffle_window_images": Effect.RESULT,
    "data.shuffle_window_mib": Effect.RESULT,
    "data.block_cache_mib": Effect.NOTHING,  # a cache of what the files hold; windows follow from sizes, not from it
    "data.max_row_group_mib": Effect.NOTHING,  # ends a run, or reads a row group in parts
    "data.image_column": Effect.RESULT,
    "data.label_column": Effect.METRICS,  # that labels make a split possible shows in the training images
    "views.global_views": Effect.WEIGHTS,
    "views.local_views": Effect.WEIGHTS,
    "views.masks": Effect.WEIGHTS,
    "views.mean": Effect.WEIGHTS,
    "views.std": Effect.WEIGHTS,
    "views.evaluation_resize_px": Effect.METRICS,
    "views.evaluation_interpolation": Effect.METRICS,
    "selection": Effect.WEIGHTS,
    "method": Effect.WEIGHTS,
    "optimizer": Effect.WEIGHTS,
    "training.epochs": Effect.WEIGHTS,
    "training.num_steps": Effect.WEIGHTS,
    "training.images_per_step": Effect.WEIGHTS,
    "training.accumulation_steps": Effect.WEIGHTS,
    "training.activation_checkpointing": Effect.NOTHING,  # activations are computed again, to the same bits
    "training.checkpoint_every_steps": Effect.NOTHING,  # a resume continues with the same bits
    "training.keep_checkpoints": Effect.NOTHING,  # the newest one is always kept
    "training.torch_threads": Effect.WEIGHTS,
    "training.precision": Effect.WEIGHTS,
    "training.compile": Effect.WEIGHTS,
    "training.cuda_graphs": Effect.WEIGHTS,
    "training.max_collapsed_steps": Effect.NOTHING,  # ends a run
    "training.initial_weights": Effect.RESULT,
    "training.initial_run": Effect.RESULT,
    "cluster.num_trainers": Effect.RESULT,
    "cluster.min_trainers": Effect.RESULT,
    "cluster.resize_check_seconds": Effect.NOTHING,  # of elastic runs, whose identity is "elastic"
    "cluster.sharding": Effect.WEIGHTS,  # another order of sums
    "cluster.placement": Effect.NOTHING,  # nodes, not numbers
    "cluster.num_view_workers": Effect.NOTHING,  # views are a function of the plan, on any worker
    "cluster.max_view_workers": Effect.NOTHING,  # see num_view_workers
    "cluster.renderer": Effect.RESULT,
    "cluster.device": Effect.RESULT,
    "cluster.batches_in_flight": Effect.NOTHING,  # batches are used in step order
    "cluster.cpus_per_trainer": Effect.NOTHING,  # a reservation; torch_threads sets the threads
    "cluster.cpus_per_view_worker": Effect.NOTHING,  # a reservation
    "cluster.ship": Effect.NOTHING,  # views are rendered to the same bits on either side
    "cluster.finishers_per_trainer": Effect.NOTHING,  # see num_view_workers
    "cluster.gpus_for_knn": Effect.RESULT,
    "cluster.gpus_per_trainer": Effect.NOTHING,  # a reservation and a limit of memory
    "cluster.gpus_per_dali_worker": Effect.NOTHING,  # a reservation
    "cluster.object_store_mib": Effect.NOTHING,  # room for batches in flight
    "cluster.late_factor": Effect.NOTHING,  # a late batch is rendered again, to the same bits
    "cluster.late_seconds": Effect.NOTHING,  # see late_factor
    "cluster.stall_seconds": Effect.NOTHING,  # ends a run
    "cluster.max_trainer_failures": Effect.NOTHING,  # ends a run
    "tracking.uri": Effect.NOTHING,  # a copy of the journal
    "tracking.loggers": Effect.NOTHING,  # copies of the journal
    "tracking.experiment": Effect.NOTHING,  # names a copy of the journal
    "tracking.log_every_steps": Effect.METRICS,  # means over the run are means over the recorded steps
    "tracking.knn_neighbours": Effect.METRICS,
    "tracking.knn_images": Effect.METRICS,
    "tracking.knn_every_epochs": Effect.NOTHING,  # more or fewer points of one curve; each has its step
    "tracking.selection_images_per_epoch": Effect.METRICS,  # the analysis pools the logged images of an epoch
    "tracking.comparison": Effect.NOTHING,  # a tag
    "tracking.arm": Effect.NOTHING,  # a tag
    "tracking.num_figure_images": Effect.NOTHING,  # pictures, which change no number
}

VERSIONS = (
    "torch",
    "numpy",
    "pillow",
    "pillow-heif",
    "simplejpeg",
    "opencv-python-headless",
    "timm",
    "nvidia-dali-cuda130",
)
"""Parts of the identity that are versions of libraries."""

ACCEPTED_VERSIONS = "accepted_versions"
"""Entry of config.json: other versions that the run may be resumed with (`runs/versions.py`). Comparisons refuse it."""


def effect_of(name: str) -> Effect:
    """Return what a field may change.

    Args:
        name: dotted, as `flatten` names it. A section without fields of its own in the table stands for all its fields.

    Raises:
        LookupError: the field is not classified.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (effect := _EFFECTS.get(".".join(parts[:length]))) is not None:
            return effect
    raise LookupError(f"hvp_ray/identity.py does not classify the config field {name}; add a line for it")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """Values that a run's settings result in; made by `runs.record.resolve`, once for all runs of a comparison."""

    renderer: RendererName
    device: str
    """cpu or cuda; what trainers run on."""
    training_data: dict[str, str]
    """Name -> digest: `Dataset.training_parts`."""
    test_data: dict[str, str]
    """Name -> digest: `Dataset.test_parts`."""
    initial_weights: str | None
    """Digest of the weights that training starts from: of a file (`file_digest`), or of the newest checkpoint of a run."""
    torch_version: str
    """Version of torch with its build, for instance 2.13.0+cu130."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Facts that must be equal for two runs to be the same run, as plain values by name."""

    weights: dict[str, Any]
    """Facts that may change a bit of the weights."""
    evaluation: dict[str, Any]
    """Further facts that the metrics depend on."""

    @property
    def digest(self) -> str:
        """Digest of `weights`: equal for runs whose weights must be equal."""
        return hashlib.sha256(json.dumps(self.weights, sort_keys=True).encode()).hexdigest()


def identity_of(config: RunConfig, resolved: Resolved) -> Identity:
    """Return the identity of a run."""
    values = flat_values(config)
    elastic = config.cluster.min_trainers is not None  # whatever the numbers are, and were
    weights = {name: value for name, value in values.items() if effect_of(name) is Effect.WEIGHTS} | {
        "cluster.num_trainers": "elastic" if elastic else config.cluster.num_trainers,
        "renderer": resolved.renderer,
        "device": resolved.device,
        **resolved.training_data,
        "initial weights": resolved.initial_weights,
        "torch": resolved.torch_version,
    }
    libraries = [name for name in VERSIONS if name != "torch" and (resolved.renderer != "cpu" or "dali" not in name)]
    evaluation = {name: value for name, value in values.items() if effect_of(name) is Effect.METRICS} | {
        **resolved.test_data,
        "k-NN during training on": "cuda" if config.cluster.gpus_for_knn > 0.0 else "cpu",
    }
    return Identity(weights=weights | {name: _version(name) for name in libraries}, evaluation=evaluation)


def run_record(config: RunConfig, identity: Identity) -> dict[str, Any]:
    """Return the identity as a run's config.json records it for `recorded_difference`."""
    return {
        "config": config_to_dict(config),
        "run_identity": identity.digest,
        "identity": identity.weights,
        "evaluation": identity.evaluation,
    }


def recorded_difference(
    content: bytes | str, config: RunConfig, identity: Identity, *, path: str, ignored: Collection[str] = ()
) -> list[str]:
    """Return how a recorded run differs from the run of this identity; empty: they are one run.

    Args:
        content: content of a config.json.
        config: config of the run that `identity` belongs to.
        identity: compared with the recorded one.
        path: of config.json, for messages.
        ignored: names of parts that need not be equal.

    Raises:
        CheckpointError: config.json is damaged, or was written by a version that recorded less.
    """
    try:
        record = json.loads(content)
        before = {**record["identity"], **record["evaluation"]}
        if accepted := [entry["versions"] for entry in record.get(ACCEPTED_VERSIONS, [])]:
            before[ACCEPTED_VERSIONS] = accepted
        values = flatten(record["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged, or an earlier version of hvp_ray wrote it ({type(error).__name__}: "
            f"{first_line(error)}). Expected the identity of a run. Continue the run with that version, or choose "
            f"another name (--run.name, or --comparison of hvp-ray compare)"
        ) from error
    now = {**identity.weights, **identity.evaluation}
    before, now = ({n: v for n, v in parts.items() if n not in ignored} for parts in (before, now))
    return describe_difference(before, now, values, flat_values(config))


def describe_difference(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    values_before: Mapping[str, Any],
    values_now: Mapping[str, Any],
) -> list[str]:
    """Return one line `name: before -> now` for each part that differs, and for the data settings if the data differ.

    Args:
        before: parts of an identity.
        now: parts of another one.
        values_before: the flat config that `before` is of.
        values_now: the flat config that `now` is of.
    """

    def lines(names: Collection[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in sorted(names) if old.get(n) != new.get(n)]

    difference = lines({*before, *now}, before, now)
    if any(line.startswith(("training ", "test ")) for line in difference):  # parts of `Dataset`, not fields
        sources = [name for name in values_now if name.startswith("data.") and effect_of(name) is Effect.RESULT]
        difference += lines(sources, values_before, values_now)
    return difference


def file_digest(location: str | None) -> str | None:
    """Return the digest of initial weights: a run's folder or a file. None: there are none."""
    if location is None:
        return None
    path = Path(location).expanduser()
    path = path / "backbone.safetensors" if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def flat_values(config: RunConfig) -> dict[str, Any]:
    """Return the fields of a config by dotted name, as JSON has them: lists for tuples."""
    values = flatten(config_to_dict(config))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
