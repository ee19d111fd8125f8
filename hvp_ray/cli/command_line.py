"""The command line of all programs: parse a run, find a run's folder, print, and end with an exit status."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import tyro

from hvp_ray.config import RunConfig, config_to_dict, deferred_checks, flatten
from hvp_ray.config.checks import Checked, check
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


@dataclass(frozen=True, kw_only=True)
class RunOptions(Checked):
    """Options of a program that is about one run: its recipe, and the settings that differ from it."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = DEFAULT_RECIPE
    """Settings to start from; the first argument."""

    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    """All settings, as --section.field VALUE."""


Options = TypeVar("Options", bound=Checked)
OptionsOfRun = TypeVar("OptionsOfRun", bound=RunOptions)

PARSER_SETTINGS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed)


def parse_options(kind: type[Options], arguments: list[str], *, program: str, description: str) -> Options:
    """Return the options of a program.

    Args:
        kind: a dataclass with a field for each option.
        arguments: words of the command line.
        program: for instance `hvp-ray pack`.
        description: begins the help.

    Raises:
        ConfigError: a value is out of range.
        SystemExit: an option is unknown or wrong (tyro has printed why), or --help was given.
    """
    with deferred_checks():
        options = tyro.cli(kind, args=arguments, prog=program, description=description, config=PARSER_SETTINGS)
    check(options, "--")
    return options


def parse_run_options(
    kind: type[OptionsOfRun], arguments: list[str], *, program: str, description: str
) -> OptionsOfRun:
    """Return the options of a program that is about one run. Settings that are not given are those of its recipe.

    Args:
        kind: `RunOptions`, or a dataclass that adds fields to it.
        arguments: words of the command line; the recipe is the first one.
        program: for instance `hvp-ray pretrain`.
        description: begins the help.

    Raises:
        ConfigError: the recipe is unknown, or a value is out of range.
        SystemExit: an option is unknown or wrong (tyro has printed why), or --help was given.
    """
    name = arguments[0] if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
    recipe = get_recipe(name)
    with deferred_checks():  # the whole run is checked at once, so that messages have full paths
        options = tyro.cli(
            kind,
            default=kind(run=recipe),
            args=_python_words(arguments),
            prog=program,
            description=(
                f"{description}\n\nRecipes (default {DEFAULT_RECIPE}; module:function names one of your own):\n"
                f"{describe_recipes()}\n\n{describe_common_options(recipe)}"
            ),
            use_underscores=True,
            config=PARSER_SETTINGS,
        )
    if options.recipe != name:
        raise ConfigError(f"the recipe {options.recipe!r} must be the first argument")
    if options.run.recipe != recipe.recipe:
        raise ConfigError(f"--recipe is set by the first argument, not as an option; got {options.run.recipe!r}")
    check(options, "--")
    return options


def parse_run(arguments: list[str], *, program: str, description: str) -> RunConfig:
    """Return the run that `[RECIPE] [--section.field VALUE ...]` describes; see `parse_run_options`."""
    return parse_run_options(RunOptions, arguments, program=program, description=description).run


COMMON_OPTIONS = {
    "data.source": "training images: a folder, Parquet, shards, or a URI",
    "data.test_source": "labelled images for the evaluation at the end",
    "run.name": "the name of an existing run continues it",
    "run.output": "folder of all runs",
    "selection.rule": "hardest: hard views; first: random views",
    "training.epochs": "passes over the images",
    "training.images_per_step": "images of a step, over all trainers",
    "optimizer.learning_rate_per_256": "learning rate for 256 images per step",
    "views.global_views.size_px": "size of the views",
    "cluster.num_trainers": "processes that train",
}
"""The settings that people change most: path -> what it is, in a line."""


def describe_common_options(config: RunConfig) -> str:
    """Return a line for each of the ten settings that people change most, with its value in a run."""
    values = flatten(config_to_dict(config))
    width = max(map(len, COMMON_OPTIONS)) + 2
    lines = [f"  --{path:<{width}}{text} ({values[path]})" for path, text in COMMON_OPTIONS.items()]
    return "\n".join(["Changed most, with their values here; all settings are below, by section:", *lines])


def _python_words(words: list[str]) -> list[str]:
    """Return the words with true, false and none as Python writes them; `none` is a value of tracking.uri."""
    spelling = {"true": "True", "false": "False", "none": "None"}
    before = ["", *words]
    return [
        word if option.endswith("tracking.uri") else spelling.get(word, word)
        for option, word in zip(before, words, strict=False)
    ]


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
