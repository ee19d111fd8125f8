"""Find the folder of a run by path, name or URI, read its config, and bring results back to it."""

import json
from pathlib import Path
from typing import Any

from hvp_ray.config import RunConfig, config_from_dict
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.files import Folder
from hvp_ray.runs.storage import fetch_run


def find_run(
    name: str, *, option: str = "", needs: tuple[str, ...] = ("config.json",), folders: tuple[str, ...] = ()
) -> Path:
    """Return the absolute folder of a run: a path, or a name under `runs/` here or `hvp_runs/` in the home folder.

    The needed files of a run on a bucket are copied to this machine first. The folder is that copy.

    Args:
        name: path, name, or URI of a run's folder.
        option: command-line option that gave the name, for messages.
        needs: required files.
        folders: folders in it that are read.

    Raises:
        CheckpointError: there is no such folder, or it lacks a file.
        ConfigError: the URI cannot be used.
    """
    if "://" in name:
        copy = fetch_run(name, files=needs, folders=folders, option=option.strip() or "RUN")
        return _checked(copy, name, option, needs)
    places = list(dict.fromkeys([Path(name).expanduser(), Path("runs") / name, Path.home() / "hvp_runs" / name]))
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        here = sorted(path.parent.name for path in Path("runs").glob("*/config.json"))
        known = f"; runs/ has {', '.join(here[-5:])}" if here else ""
        raise CheckpointError(
            f"{option}{name}: expected the folder of a run, or its name under runs/; there is neither "
            f"{' nor '.join(map(str, places))}{known}"
        )
    return _checked(folder.absolute(), name, option, needs)


def read_config(run_dir: Path) -> RunConfig:
    """Return the config of a run.

    Raises:
        CheckpointError: config.json is damaged.
        ConfigError: another version wrote it.
    """
    return config_from_dict(read_entry(run_dir, "config"))


def read_entry(run_dir: Path, name: str) -> dict[str, Any]:
    """Return an entry of config.json of a run: `config` or `identity`.

    Raises:
        CheckpointError: config.json is damaged.
    """
    path = run_dir / "config.json"
    try:
        values = json.loads(path.read_text())[name]
        if not isinstance(values, dict):
            raise TypeError(f"{name} is no object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as the config of a run: {error!r}") from error
    return values


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the summary of a finished run.

    Raises:
        CheckpointError: summary.json is damaged.
    """
    path = run_dir / "summary.json"
    try:
        summary = json.loads(path.read_text())
        if not isinstance(summary, dict):
            raise TypeError("no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as the summary of a run: {error!r}") from error
    return summary


def keep_results(name: str, run_dir: Path, paths: list[Path]) -> None:
    """Copy results to a run on a bucket, if they are in the local copy of its folder.

    Args:
        name: name of the run that `find_run` got.
        run_dir: folder that `find_run` returned.
        paths: files.

    Raises:
        ConfigError: the bucket refused.
    """
    if "://" not in name:
        return
    remote = Folder(name, option="RUN")
    for path in paths:
        if path.is_relative_to(run_dir):
            try:
                remote.write(path.relative_to(run_dir).as_posix(), path.read_bytes())
            except OSError as error:
                raise ConfigError(f"{path} could not be copied to {name}: {error}") from error


def _checked(folder: Path, name: str, option: str, needs: tuple[str, ...]) -> Path:
    missing = [file for file in needs if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{option}{name}: {folder} has no {' and no '.join(missing)}; expected the folder of a run"
            + (" that has ended (the encoder is written at the end)" if "backbone.safetensors" in missing else "")
        )
    return folder
