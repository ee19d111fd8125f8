"""Identity of a run: everything that may change a bit of its result, as one digest.

A run is resumed only by a run of the same identity; otherwise the difference is shown. Not part of it: where and by
how many workers views are rendered, how far ahead, what is recorded, and where results go.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from hvp_ray.config import RendererName, RunConfig, config_to_dict, flatten

_WITHOUT_EFFECT = {
    "run.name",
    "run.output",
    "run.resume",
    "data.source",  # the fingerprint of its images stands for it
    "data.test_source",
    "data.max_unreadable_fraction",
    "data.block_cache_mib",
    "data.max_row_group_mib",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.initial_weights",  # their digest stands for it
    "cluster.renderer",  # the resolved one stands for it
    "cluster.device",
}
_CLUSTER_WITH_EFFECT = {"cluster.num_trainers"}
_PIXEL_LIBRARIES = ("numpy", "pillow", "simplejpeg", "opencv-python-headless", "timm")


def identity_parts(
    config: RunConfig, *, renderer: RendererName, device: str, data_fingerprint: str, torch_version: str
) -> dict[str, Any]:
    """Return the flat values that identify a run.

    Args:
        config: the run.
        renderer: the renderer used.
        device: cpu or cuda.
        data_fingerprint: digest of the source.
        torch_version: version with build, for instance 2.13.0+cu130.
    """
    parts: dict[str, Any] = {}
    for name, value in flatten(config_to_dict(config)).items():
        section = name.split(".")[0]
        excluded = section == "tracking" or (section == "cluster" and name not in _CLUSTER_WITH_EFFECT)
        if name not in _WITHOUT_EFFECT and not excluded:
            parts[name] = list(value) if isinstance(value, tuple) else value
    if config.cluster.min_trainers is not None:
        parts["cluster.num_trainers"] = "elastic"  # whatever the numbers are, and were
    parts["renderer"] = renderer
    parts["device"] = device
    parts["data fingerprint"] = data_fingerprint
    parts["initial weights"] = _file_digest(config.training.initial_weights)
    parts["torch"] = torch_version
    libraries = [*_PIXEL_LIBRARIES, *(["nvidia-dali-cuda130"] if renderer != "cpu" else [])]
    for library in libraries:
        parts[library] = _version(library)
    return parts


def identity_digest(parts: dict[str, Any]) -> str:
    """Return the digest of `identity_parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def describe_difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one line for each value that differs: name: before -> now."""
    names = sorted({*before, *now})
    return [f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _file_digest(location: str | None) -> str | None:
    if location is None:
        return None
    path = Path(location).expanduser()
    path = path / "backbone.safetensors" if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"
