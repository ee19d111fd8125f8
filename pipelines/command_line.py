"""What the programs of this folder share: RECIPE and overrides -> a run."""

import tyro

from hvp_ray.config import RunConfig
from hvp_ray.errors import ConfigError
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
