"""Recipes: a run as a Python value. One file per method; names are `<method>-<data>[-<variant>]`."""

import difflib
from collections.abc import Callable

from hvp_ray.config import RunConfig
from hvp_ray.errors import ConfigError
from hvp_ray.recipes import simsiam

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "simsiam-digits": simsiam.simsiam_digits,
    "simsiam-cifar10-small": simsiam.simsiam_cifar10_small,
    "simsiam-cifar10": simsiam.simsiam_cifar10,
    "simsiam-imagenet-r50-100ep": simsiam.simsiam_imagenet_r50_100ep,
}


def get_recipe(name: str) -> RunConfig:
    """Return the recipe of this name.

    Raises:
        ConfigError: unknown; the message names the nearest one.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise ConfigError(f"unknown recipe {name!r}; did you mean {near[0]!r}? There are: {', '.join(RECIPES)}")
    return RECIPES[name]()


def describe_recipes() -> str:
    """Return one line for each recipe: its name and the first sentence of its docstring."""
    width = max(map(len, RECIPES))
    return "\n".join(f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items())
