"""A config as plain values for JSON, and back; flat for logs and identities."""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from hvp_ray.config.checks import Checked, deferred_checks, hints_of
from hvp_ray.config.method import MethodConfig
from hvp_ray.config.run_config import RunConfig
from hvp_ray.errors import ConfigError

METHOD_TYPE = "type"
"""Key of the class of a method's config, as `module:class`."""


def config_to_dict(config: object) -> dict[str, Any]:
    """Return the config as nested plain values, ready for JSON."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"expected a config value, got {config!r}")
    values = dataclasses.asdict(config)
    if isinstance(config, RunConfig):
        kind = type(config.method)
        values["method"] = {METHOD_TYPE: f"{kind.__module__}:{kind.__qualname__}"} | values["method"]
    return values


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted names, in order."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def config_from_dict(nested: dict[str, Any]) -> RunConfig:
    """Rebuild the value that `config_to_dict` took apart.

    Raises:
        ConfigError: a field is missing, unknown or out of range.
    """
    if not isinstance(nested, dict):
        raise ConfigError(f"config.json does not describe a run, but has {str(nested)[:100]!r}")
    with deferred_checks():
        built = _build(RunConfig, nested, "")
    assert isinstance(built, RunConfig)
    return built


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Return the config with some settings replaced.

    Args:
        config: a run.
        settings: path -> value, for instance `{"training.epochs": 10}`.

    Raises:
        ConfigError: there is no such setting, or a value is out of range.
    """
    nested = config_to_dict(config)
    known = flatten(nested)
    for path, value in settings.items():
        *sections, name = path.split(".")
        place: Any = nested
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place or isinstance(place[name], dict):
            near = difflib.get_close_matches(path, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no setting {path!r} in {config.recipe}{hint}")
        place[name] = str(value) if isinstance(value, Path) else value
    return config_from_dict(nested)


def _build(kind: type[Any], nested: dict[str, Any], path: str) -> object:
    if kind is MethodConfig:
        kind, nested = _method_type(nested), {key: value for key, value in nested.items() if key != METHOD_TYPE}
    hints = hints_of(kind)
    place = path or "the run"
    if unknown := sorted(set(nested) - set(hints)):
        raise ConfigError(f"config.json has unknown fields {unknown} in {place}; written by another version?")
    values = {}
    for name, value in nested.items():
        hint = hints[name]
        candidates = [hint, *get_args(hint)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Checked)), None)
        if section is not None and isinstance(value, dict):
            values[name] = _build(section, value, f"{path}{name}.")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"config.json does not describe {kind.__name__} at {place}: {error}") from error


def _method_type(nested: dict[str, Any]) -> type[Any]:
    """Return the class of a method's config: a `MethodConfig` of the package or of a user's module."""
    module, _, name = str(nested.get(METHOD_TYPE, "")).partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"config.json names the method {module}:{name}, which cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, MethodConfig)):
        raise ConfigError(f"config.json names the method {module}:{name}, which is no MethodConfig")
    return kind
