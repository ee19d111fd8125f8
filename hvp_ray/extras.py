"""Optional packages: imported where they are used, with one sentence if they are missing."""

import importlib
from typing import Any

from hvp_ray.errors import ConfigError


def require_extra(module: str, *, extra: str, purpose: str) -> Any:
    """Import and return an optional module.

    Args:
        module: name of the module.
        extra: the extra of this package that installs it.
        purpose: what needs it, as the subject of a sentence: "tracking.loggers=wandb".

    Raises:
        ConfigError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the package {error.name or module}, which is not installed: pip install 'hvp-ray[{extra}]'"
        ) from error
