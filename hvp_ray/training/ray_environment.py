"""Environment of Ray, set before it is imported: authentication always explicit, telemetry off.

Ray 2.60 has three different defaults for token authentication, depending on who starts what; here it is always said.
"""

import os
import secrets
from pathlib import Path

_TOKEN_PATH = Path("~/.ray/auth_token")


def prepare_ray_environment() -> None:
    """Set what is not set yet; call before `import ray`."""
    joins = "RAY_ADDRESS" in os.environ
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token" if not joins or _has_token() else "disabled"
    if not joins and os.environ["RAY_AUTH_MODE"] == "token" and not _has_token():
        _write_token()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_REPORT_URL", "http://127.0.0.1:9/")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    path = _TOKEN_PATH.expanduser()
    return path.is_file() and path.stat().st_size > 0


def _write_token() -> None:
    """Make a token that only this account can read; Ray itself would make one that everybody can read."""
    path = _TOKEN_PATH.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
