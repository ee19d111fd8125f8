"""Refuse passwords, keys and tokens in URIs, because URIs are written to config.json, to logs and to MLflow.

Called for every setting that may be a URI (`config/`), and for every URI that is opened (`files.py`).
"""

import re
from urllib.parse import parse_qsl

from hvp_ray.errors import ConfigError

_SECRET_PARAMETERS = re.compile(r"key|secret|token|passw|pwd|signature|credential|^sig$", re.IGNORECASE)
_AWS = "in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in ~/.aws/credentials or in the machine's role"
_GOOGLE = "in the file that GOOGLE_APPLICATION_CREDENTIALS names or in the machine's service account"
_AZURE = "in AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET or in the machine's identity"
_PLACES_OF_CREDENTIALS = {
    "s3": _AWS,
    "gs": _GOOGLE,
    "gcs": _GOOGLE,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "http": "in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (an MLflow server), or in ~/.netrc",
    "https": "in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (an MLflow server), or in ~/.netrc",
    "postgresql": "in PGUSER and PGPASSWORD or in ~/.pgpass",
}


def refuse_credentials(path: str, location: str | None) -> None:
    """Refuse a password, key or token in a URI: it would be written to config.json, to logs and to MLflow.

    Args:
        path: setting that gave the location, for the message.
        location: a path or a URI. None: nothing was given.

    Raises:
        ConfigError: the URI has one. The message names the right place for it, and does not repeat the URI.
    """
    scheme, mark, rest = (location or "").partition("://")
    if not mark:
        return
    scheme = scheme.lower()
    before_query, _, query = rest.partition("?")
    # A pasted secret may contain slashes, so the search covers the whole path and not only the host.
    named = (
        before_query.partition("/")[0] if scheme in ("file", "hdfs") or scheme.startswith("sqlite") else before_query
    )
    is_user_secret = scheme in ("s3", "http", "https")  # access keys and tokens have no colon there
    has_user = "@" in (named.partition("/")[0] if is_user_secret else "") or re.match(r"[^@]*:(?!\d+/)[^@]*@", named)
    parameters = [name for name, value in parse_qsl(query) if _SECRET_PARAMETERS.search(name) or "@" in value]
    if has_user or parameters:
        what = f"the parameter {parameters[0]!r}" if parameters else "the part before the @"
        place = place_of_credentials(scheme) or "in the environment of the processes"
        raise ConfigError(
            f"{path} carries credentials ({what}), and it is written to logs, to config.json and to MLflow; take them out of "
            f"the {scheme}:// URI. They belong {place}, on every node"
        )


def place_of_credentials(scheme: str) -> str | None:
    """Return where the credentials of a kind of storage or server belong, for messages; None: unknown."""
    return _PLACES_OF_CREDENTIALS.get(scheme.partition("+")[0])
