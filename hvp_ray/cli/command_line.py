"""The command line of all programs: parse a run, find a run's folder, print, and end with an exit status."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import tyro

from hvp_ray.config import RunConfig, deferred_checks
from hvp_ray.errors import CheckpointError, ConfigError, HvpRayError
from hvp_ray.recipes import describe_recipes, get_recipe

DEFAULT_RECIPE = "simsiam-digits"


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def exit_status(work: Callable[[], None], *, stopped: str = "stopped") -> int:
    """Do the work of a program; return 0, or 1 after a `HvpRayError`, or 130 after Ctrl-C.

    Args:
        work: raises `HvpRayError` with a sentence for the user.
        stopped: message after Ctrl-C.
    """
    try:
        work()
    except HvpRayError as error:
        notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", []))
        print(f"error: {error}{notes}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr, flush=True)
        return 130
    return 0


def parse_run(arguments: list[str], *, program: str, description: str) -> RunConfig:
    """Return the run that `[RECIPE] [--section.field VALUE ...]` describes.

    Raises:
        ConfigError: the recipe is unknown, or a value is out of range.
        SystemExit: an option is unknown or wrong (tyro has printed why), or --help was given.
    """
    name = arguments[0] if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
    rest = arguments[1:] if arguments and not arguments[0].startswith("-") else arguments
    recipe = get_recipe(name)
    words = [{"true": "True", "false": "False", "none": "None"}.get(word, word) for word in rest]
    for index, word in enumerate(rest):
        if word == "none" and index and rest[index - 1].endswith("tracking.uri"):
            words[index] = "none"  # a value with its own meaning there
    with deferred_checks():  # the whole run is checked at once, so that messages have full paths
        parsed: RunConfig = tyro.cli(
            RunConfig,
            default=recipe,
            args=words,
            prog=f"{program} [RECIPE]",
            description=(
                f"{description}\n\nRecipes (default {DEFAULT_RECIPE}; module:function names one of your own):\n"
                f"{describe_recipes()}"
            ),
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed),
        )
    if parsed.recipe != recipe.recipe:
        raise ConfigError(f"--recipe is set by the first argument, not as an option; got {parsed.recipe!r}")
    return parsed


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
        from hvp_ray.runs.storage import fetch_run

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


def leave(status: int) -> NoReturn:
    """End the program and the Ray that it started. If Ray died, skip the clean-up, which would wait for Ray."""
    connect = sys.modules.get("hvp_ray.stream.connect")
    if connect is not None:
        connect.end_ray()
        if connect.is_abandoned():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


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
    from hvp_ray.files import Folder

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
