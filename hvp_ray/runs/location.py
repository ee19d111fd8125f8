"""Resolve where runs and MLflow's store are, and draw names of runs."""

import dataclasses
import os
import secrets
import time
from pathlib import Path

from hvp_ray.config import RunConfig
from hvp_ray.credentials import refuse_credentials
from hvp_ray.data.listing import MLFLOW_ARTIFACTS
from hvp_ray.errors import ConfigError
from hvp_ray.files import is_uri
from hvp_ray.tracking.mlflow import mlflow_is_installed
from hvp_ray.tracking.mlflow_store import store_uri

SHIPPED_CODE_MARK = "working_dir_files"
"""Part of the path of the temporary copy that `ray job submit --working-dir` makes."""


def output_location(config: RunConfig) -> str:
    """Return the location of all runs: an absolute path, or a URI.

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
    """Resolve `run.output` and `tracking.uri` from this process's working folder and environment."""
    server, tracking = os.environ.get("MLFLOW_TRACKING_URI"), config.tracking
    if tracking.uri == "auto" and server:
        refuse_credentials("MLFLOW_TRACKING_URI", server)
        tracking = dataclasses.replace(tracking, uri=server)
    run = dataclasses.replace(config.run, output=output_location(config))
    return dataclasses.replace(config, run=run, tracking=tracking)


def local_output(config: RunConfig) -> Path:
    """Return the default folder of MLflow's SQLite file. Runs on a bucket use the default output folder."""
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


def draw_run_name(config: RunConfig) -> str:
    """Return a name that no other run has."""
    recipe = config.recipe.replace(":", "-")  # a user's recipe is module:function
    return f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
