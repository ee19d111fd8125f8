"""Recipes: a run as a Python value. One file per method; names are `<method>-<data>[-<variant>]`."""

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable

from hvp_ray.config import RunConfig
from hvp_ray.errors import ConfigError
from hvp_ray.recipes import dino, dinov2, ibot, own, simclr, simsiam

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "simsiam-digits": simsiam.simsiam_digits,
    "simsiam-cifar10-small": simsiam.simsiam_cifar10_small,
    "simsiam-cifar10": simsiam.simsiam_cifar10,
    "simsiam-imagenet-r50-100ep": simsiam.simsiam_imagenet_r50_100ep,
    "simclr-digits": simclr.simclr_digits,
    "simclr-cifar10-small": simclr.simclr_cifar10_small,
    "simclr-imagenette-small": simclr.simclr_imagenette_small,
    "simclr-cifar10": simclr.simclr_cifar10,
    "simclr-imagenet-r50-100ep": simclr.simclr_imagenet_r50_100ep,
    "dino-digits": dino.dino_digits,
    "dino-cifar10-small": dino.dino_cifar10_small,
    "dino-cifar10": dino.dino_cifar10,
    "dino-imagenet-vits16-100ep": dino.dino_imagenet_vits16_100ep,
    "dino-imagenet-vits16-800ep": dino.dino_imagenet_vits16_800ep,
    "dino-imagenet-r50-100ep": dino.dino_imagenet_r50_100ep,
    "ibot-digits": ibot.ibot_digits,
    "ibot-cifar10": ibot.ibot_cifar10,
    "ibot-imagenet-vits16-100ep": ibot.ibot_imagenet_vits16_100ep,
    "dinov2-digits": dinov2.dinov2_digits,
    "dinov2-cifar10-small": dinov2.dinov2_cifar10_small,
    "dinov2-imagenet-vits14": dinov2.dinov2_imagenet_vits14,
    "dinov2-imagenet-vitl14": dinov2.dinov2_imagenet_vitl14,
    "simsiam-own": own.simsiam_own,
    "simclr-own": own.simclr_own,
    "dino-own": own.dino_own,
    "dinov2-own": own.dinov2_own,
}


DEFAULT_RECIPE = "simsiam-digits"


def get_recipe(name: str) -> RunConfig:
    """Return the recipe of this name, or the value of `module:function` for a recipe of your own.

    Raises:
        ConfigError: unknown; the message names the nearest one.
    """
    if ":" in name:
        return _recipe_of_module(name)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise ConfigError(f"unknown recipe {name!r}; did you mean {near[0]!r}? There are: {', '.join(RECIPES)}")
    return RECIPES[name]()


def _recipe_of_module(name: str) -> RunConfig:
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the recipe {name!r} cannot be imported: {error}; a recipe is a function of a module on PYTHONPATH, without "
            f"arguments"
        ) from error
    config = make() if inspect.isfunction(make) else make
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"the recipe {name!r} gives {type(config).__name__}, expected a function that gives a RunConfig"
        )
    return dataclasses.replace(config, recipe=name)


def describe_recipes() -> str:
    """Return one line for each recipe: its name and the first sentence of its docstring."""
    width = max(map(len, RECIPES))
    return "\n".join(f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items())
