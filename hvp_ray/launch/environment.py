"""Environment of Ray, set before Ray is imported: explicit authentication and encryption, no telemetry, usable folders.

Ray 2.60 has three different defaults for token authentication, so it is always set here. Libraries fail with tracebacks if
the user id of a container has no account or home folder, or if TMPDIR is too long for Ray's sockets.
"""

import contextlib
import os
import pwd
import secrets
import socket
import stat
import sys
import tempfile
from pathlib import Path

from hvp_ray.errors import ConfigError

_TOKEN_PATH = Path("~/.ray/auth_token")
_TLS_FOLDER = Path("~/.ray/tls")
"""Where cluster/with_tls.sh looks for the certificates of this machine too."""
_LONGEST_TEMPORARY_FOLDER = 41
"""Characters; Ray appends up to 66 for a socket, and the system allows 107."""


def prepare_ray_environment() -> None:
    """Set the variables that are unset; call before `import ray`.

    Raises:
        ConfigError: no folder can hold Ray's files.
    """
    prepare_home()
    _shorten_temporary_folder()
    if os.environ.get("RAY_ADDRESS") == "local":  # Ray's name for no cluster
        del os.environ["RAY_ADDRESS"]
    joins = bool(os.environ.get("RAY_ADDRESS"))
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token" if not joins or _has_token() else "disabled"
    if not joins and os.environ["RAY_AUTH_MODE"] == "token" and not _has_token():
        _write_token()
    if joins:
        _use_certificates()
    elif not _has_joined():  # a local Ray stays on this machine
        os.environ["RAY_USE_TLS"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_REPORT_URL", "http://127.0.0.1:9/")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def prepare_home() -> None:
    """Name a user and a home folder if the user id has no account, or HOME cannot be read.

    Raises:
        ConfigError: see `_private_folder`.
    """
    user = os.getuid()
    try:
        pwd.getpwuid(user)
    except KeyError:
        os.environ.setdefault("USER", f"uid-{user}")  # read by `getpass` before it looks up the account
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an account
        home = Path("/")
    if home == Path("/") or not os.access(home, os.R_OK | os.X_OK):
        os.environ["HOME"] = str(_private_folder())


def _private_folder() -> Path:
    """Return a folder that replaces the home folder.

    Raises:
        ConfigError: the path belongs to another user or is no folder.
    """
    folder = Path(tempfile.gettempdir()) / f"hvp_ray-home-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(
            f"there is no usable home folder, and {folder} is no folder of this user; set HOME to a folder that you own"
        )
    return folder


def _shorten_temporary_folder() -> None:
    """Let Ray use /tmp if TMPDIR is too long for its sockets. Other files stay in TMPDIR.

    Raises:
        ConfigError: /tmp cannot be written.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "")
    if len(os.fsencode(folder)) <= _LONGEST_TEMPORARY_FOLDER:
        return
    if name == "RAY_TMPDIR" or not os.access("/tmp", os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}={folder} is too long for Ray's sockets; set RAY_TMPDIR to a folder of at most "
            f"{_LONGEST_TEMPORARY_FOLDER} characters"
        )
    os.environ["RAY_TMPDIR"] = "/tmp"


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    path = _TOKEN_PATH.expanduser()
    return path.is_file() and path.stat().st_size > 0


def _has_joined() -> bool:
    """Return whether this program has started or joined Ray by itself, without RAY_ADDRESS."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _use_certificates() -> None:
    """Switch TLS on if this machine has certificates of a cluster, as a token switches authentication on."""
    folder, host = _TLS_FOLDER.expanduser(), socket.gethostname()
    files = {
        "RAY_TLS_CA_CERT": folder / "ca.crt",
        "RAY_TLS_SERVER_CERT": folder / f"{host}.crt",
        "RAY_TLS_SERVER_KEY": folder / f"{host}.key",
    }
    if "RAY_USE_TLS" not in os.environ and all(path.is_file() for path in files.values()):
        os.environ["RAY_USE_TLS"] = "1"
        for name, path in files.items():
            os.environ.setdefault(name, str(path))


def _write_token() -> None:
    """Write a token that only this account can read. Ray's own would be readable by all accounts."""
    path = _TOKEN_PATH.expanduser()
    flags, mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, flags, mode)
    except OSError:  # the home folder is read-only
        path = _private_folder() / "auth_token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
        descriptor = os.open(path, flags, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
