"""The user's cache folder (XDG_CACHE_HOME, else ~/.cache): local copies of files that are on a bucket."""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from hvp_ray.config import RunConfig
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.files import is_uri, join_uri, read_file

BACKBONE = "backbone.safetensors"
"""Name of the trained encoder in a run's folder."""
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def cache_folder() -> Path:
    """Return the folder for local copies.

    Raises:
        ConfigError: this account has no home folder.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(f"{error}; set the environment variable XDG_CACHE_HOME to a folder") from error
    return Path(root).absolute() / "hvp_ray"


@functools.cache
def local_weights(location: str) -> str:
    """Return the path of initial weights; those at a URI are downloaded, once per process.

    Args:
        location: `training.initial_weights`: a run's folder or a file, path or URI.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: the URI or the local disk cannot be used.
    """
    if not is_uri(location):
        return location
    option = "training.initial_weights"
    suffix = PurePosixPath(urlsplit(location).path).suffix
    uri = location if suffix in WEIGHT_SUFFIXES else join_uri(location, BACKBONE)
    try:
        content = read_file(uri, option=option)
    except OSError as error:
        raise CheckpointError(f"{option}={location!r} cannot be read: {error}") from error
    if content is None:
        raise CheckpointError(f"{option}={location!r}: there is no file {uri}")
    path = cache_folder() / "weights" / f"{hashlib.sha256(content).hexdigest()}{PurePosixPath(uri).suffix}"
    try:
        if not path.is_file():
            write_local(path, content)
    except OSError as error:
        raise no_local_disk(path.parent, error) from error
    return str(path)


def with_local_weights(config: RunConfig) -> RunConfig:
    """Return the config with `training.initial_weights` as a path on this machine; see `local_weights`."""
    weights = config.training.initial_weights
    if weights is None:
        return config
    training = dataclasses.replace(config.training, initial_weights=local_weights(weights))
    return dataclasses.replace(config, training=training)


def write_local(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all; other processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def no_local_disk(folder: Path, error: OSError) -> ConfigError:
    """Return the error for a cache folder that cannot be written."""
    return ConfigError(
        f"the local copy {folder} cannot be written: {error.strerror or error}; set the environment variable "
        f"XDG_CACHE_HOME to another folder"
    )
