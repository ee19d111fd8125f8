"""What the programs of this folder share: RECIPE and overrides -> a run; the name of a run -> its folder."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import tyro

from hvp_ray.config import RunConfig, deferred_checks
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.recipes import describe_recipes, get_recipe

DEFAULT_RECIPE = "simsiam-digits"


def parse_run(arguments: list[str], *, program: str, description: str) -> RunConfig:
    """Return the run that `[RECIPE] [--section.field VALUE ...]` describes.

    Raises:
        ConfigError: unknown recipe, or a value out of range.
        SystemExit: unknown or wrong option (tyro has printed why), or --help.
    """
    name = arguments[0] if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
    rest = arguments[1:] if arguments and not arguments[0].startswith("-") else arguments
    recipe = get_recipe(name)
    words = [{"true": "True", "false": "False", "none": "None"}.get(word, word) for word in rest]
    for index, word in enumerate(rest):
        if word == "none" and index and rest[index - 1].endswith("tracking.uri"):
            words[index] = "none"  # a value of its own there
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
    """Return the folder of a run, absolute: a path, or a name under `runs/` here or `hvp_runs/` in the home folder.

    Of a run on a bucket, what is needed is copied to this machine first, and the folder is that copy.

    Args:
        name: path, name, or the URI of a run's folder.
        option: what it was given by, for messages.
        needs: files that must be there.
        folders: folders in it that are read.

    Raises:
        CheckpointError: there is no such folder, or a file is missing in it.
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
    """End the program and the Ray that it started. Skip the clean-up, which waits for Ray, if Ray died."""
    connect = sys.modules.get("hvp_ray.stream.connect")
    if connect is not None:
        connect.end_ray()
        if connect.is_abandoned():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(status)


def keep_results(name: str, run_dir: Path, paths: list[Path]) -> None:
    """Bring results to a run on a bucket; those that lie elsewhere than in its copy were asked for elsewhere.

    Args:
        name: of the run, as `find_run` took it.
        run_dir: what `find_run` returned.
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
                raise ConfigError(f"{path} could not be brought to {name}: {error}") from error


def _checked(folder: Path, name: str, option: str, needs: tuple[str, ...]) -> Path:
    missing = [file for file in needs if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{option}{name}: {folder} has no {' and no '.join(missing)}; expected the folder of a run"
            + (" that has ended (the encoder is written at the end)" if "backbone.safetensors" in missing else "")
        )
    return folder
