"""The command line of all programs: parse options, print, and end with an exit status."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, NoReturn, TypeVar

import tyro

from hvp_ray.comparison.arms import refusal_for_existing_run, run_of_arm
from hvp_ray.config import RunConfig, conditions_left_out, config_to_dict, deferred_checks, flatten, with_settings
from hvp_ray.config.checks import Checked, check
from hvp_ray.errors import ConfigError, HvpRayError
from hvp_ray.launch.environment import prepare_ray_environment
from hvp_ray.recipes import DEFAULT_RECIPE, describe_recipes, get_recipe
from hvp_ray.recipes.own import OWN_RECIPES, UNUSUAL


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


@dataclass(frozen=True, kw_only=True)
class ArmOptions(RunOptions):
    """Options of a program that is about one run, which may be that of an arm."""

    arm: str | None = None
    """Change the run as this arm of `hvp-ray compare` does: asym-aug, all-pairs, hardest:start_fraction=0.5, ..."""

    def configured(self) -> RunConfig:
        """Return the run, as the arm changes it.

        Raises:
            ConfigError: the arm is unknown, or the recipe does not allow it.
        """
        return self.run if self.arm is None else run_of_arm(self.arm, self.run)


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
        options = tyro.cli(
            kind,
            args=arguments,
            prog=program,
            description=description,
            use_underscores=True,  # the names in Python; hyphens are understood too
            config=PARSER_SETTINGS,
        )
    check(options, "--")
    return options


def parse_run_options(
    kind: type[OptionsOfRun], arguments: list[str], *, program: str, description: str
) -> OptionsOfRun:
    """Return the options of a program that is about one run.

    Defaults come from the recipe. Without a recipe they come from the existing run `--run.name`, or else from the default
    recipe.

    Args:
        kind: `RunOptions`, or a dataclass that adds fields to it.
        arguments: words of the command line; the recipe is the first one.
        program: for instance `hvp-ray pretrain`.
        description: begins the help.

    Raises:
        ConfigError: the recipe is unknown, or a value is out of range.
        DataError: the recipe adapts itself to images that cannot be used.
        SystemExit: an option is unknown or wrong (tyro has printed why), or --help was given.
    """
    is_named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if is_named else DEFAULT_RECIPE
    recipe = get_recipe(name)

    adapts_itself = name in OWN_RECIPES

    def parse(default: RunConfig, *, is_complete: bool = True) -> OptionsOfRun:
        # The whole run is checked at once, so that messages have full paths.
        with deferred_checks(), nullcontext() if is_complete else conditions_left_out():
            return tyro.cli(
                kind,
                default=kind(run=default),
                args=_python_words(arguments),
                prog=program,
                description=(
                    f"{description}\n\nRecipes (default {DEFAULT_RECIPE}; module:function names one of your own):\n"
                    f"{describe_recipes()}\n\n{describe_common_options(default)}"
                ),
                use_underscores=True,
                config=PARSER_SETTINGS,
            )

    recorded = None if is_named else _recorded_settings(recipe, arguments)
    recipe = recorded or recipe
    options = parse(recipe, is_complete=not adapts_itself)
    if adapts_itself:
        prepare_ray_environment()
        from hvp_ray.runs.fit_recipe import fit_own_recipe  # imports Ray

        from_elsewhere = parse(OWN_RECIPES[name](UNUSUAL), is_complete=False)
        fitted = fit_own_recipe(options.run, given=_same(recipe, options.run, from_elsewhere.run))
        say("\n".join(fitted.lines) + "\n")
        options = parse(fitted.config)
        recorded = fitted.config if fitted.is_recorded else None
    if options.recipe != name:
        raise ConfigError(f"the recipe {options.recipe!r} must be the first argument")
    if options.run.recipe != recipe.recipe:
        raise ConfigError(f"--recipe is set by the first argument, not as an option; got {options.run.recipe!r}")
    if recorded and isinstance(options, ArmOptions) and options.arm is not None:
        raise refusal_for_existing_run(options.arm, recorded.run.name)
    check(options, "--")
    return options


def _recorded_settings(default: RunConfig, words: list[str]) -> RunConfig | None:
    """Return the settings of the existing run that the words name, or None; say which."""
    given: dict[str, str] = {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        option, equals, value = word.partition("=")
        if option in ("--run.name", "--run.output"):
            given[option.removeprefix("--")] = value if equals else following
    if not given.get("run.name"):
        return None
    prepare_ray_environment()
    from hvp_ray.runs.location import output_location
    from hvp_ray.runs.record import describe_recorded, recorded_settings

    asked = with_settings(default, given)
    recorded = recorded_settings(asked)
    if recorded is None:
        say(
            f"{output_location(asked)} has no run {asked.run.name!r}; a new one starts, with the recipe {default.recipe}\n"
        )
        return None
    say(f"{describe_recorded(recorded)}\n")
    return recorded


def _same(usual: RunConfig, *parsed: RunConfig) -> list[str]:
    """Return the settings, as paths, that are the same in two runs parsed from different starting points."""
    unusual = flatten(config_to_dict(OWN_RECIPES[usual.recipe](UNUSUAL)))
    ours, theirs = (flatten(config_to_dict(run)) for run in parsed)
    return [
        path
        for path, value in flatten(config_to_dict(usual)).items()
        if value != unusual.get(path) and ours.get(path) == theirs.get(path)
    ]


def parse_run(arguments: list[str], *, program: str, description: str) -> RunConfig:
    """Return the run that `[RECIPE] [--arm ARM] [--section.field VALUE ...]` describes; see `parse_run_options`."""
    return parse_run_options(ArmOptions, arguments, program=program, description=description).configured()


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
    values_are = (
        "a run of this recipe chooses them by your images" if config.recipe in OWN_RECIPES else "with their values here"
    )
    return "\n".join([f"Changed most ({values_are}); all settings are below, by section:", *lines])


def _python_words(words: list[str]) -> list[str]:
    """Return the words with true, false and none as Python writes them; `none` is a value of tracking.uri."""
    spelling = {"true": "True", "false": "False", "none": "None"}
    before = ["", *words]
    return [
        word if option.endswith("tracking.uri") else spelling.get(word, word)
        for option, word in zip(before, words, strict=False)
    ]


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
