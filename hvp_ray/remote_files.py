"""Files behind a URI (s3://, gs://, abfs://, hdfs://, file://), by pyarrow.fs: what stumbles is tried again, with a warning.

Small files as a whole, for the folders of runs (`runs/storage.py`, `checkpoint.py`, `preparation.py`) and for packing
(`data/packing.py`); `open_uri` for all that read parts of large ones (`data/files.py`).
Every storage error leaves this file as an OSError; what a user got wrong in a URI as a ConfigError with the way out.
"""

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from hvp_ray.credentials import place_of_credentials, refuse_credentials
from hvp_ray.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSES_SECONDS = (1.0, 3.0, 10.0)
"""Between attempts; the libraries behind pyarrow try for some seconds within each of them."""

_GCS_PATIENCE = "retry_limit_seconds=60"
"""Without it an attempt takes 15 minutes to fail."""

_BUCKETS = ("s3", "gcs", "abfs")
"""Storages that need no folder to be made before a file."""


def is_uri(location: str) -> bool:
    """Tell whether a location is a URI; otherwise it is a path."""
    return "://" in location


def join_uri(uri: str, *names: str) -> str:
    """Return the URI of something in the folder `uri`: names go before the query (`?region=...`)."""
    path, mark, query = uri.partition("?")
    return "/".join([path.rstrip("/"), *names]) + mark + query


def place_in(folder: str, *names: str) -> str:
    """Return the location of something in a folder, which is a path or a URI."""
    return join_uri(folder, *names) if is_uri(folder) else str(Path(folder).joinpath(*names))


def is_inside(name: str) -> bool:
    """Tell whether a name stays in its folder on the local disk too; a bucket may hold any name."""
    return not name.startswith("/") and ".." not in name.split("/")


def open_uri(uri: str, *, option: str, pauses: tuple[float, ...] | None = None) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI, and the path in it.

    Args:
        uri: a URI.
        option: what it was given by, for messages.
        pauses: see `retried`.

    Raises:
        ConfigError: credentials in it, an unknown scheme or parameter, or no storage answers.
    """
    refuse_credentials(option, uri)
    scheme = uri.partition("://")[0].lower()
    full = uri
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in uri:
        full += ("&" if "?" in uri else "?") + _GCS_PATIENCE
    try:
        filesystem, path = retried(lambda: pafs.FileSystem.from_uri(full), f"opening {uri}", pauses=pauses)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ConfigError(
            f"{option}={uri!r} is not a storage that can be used: {first_line(error)}; expected a folder, or a URI such as "
            f"s3://bucket/prefix, gs://bucket/prefix, abfs://container@account.dfs.core.windows.net/prefix, "
            f"hdfs://host:port/folder or file:///folder. A server that speaks S3: s3://bucket/prefix?endpoint_override="
            f"HOST:PORT&scheme=http"
        ) from error
    except OSError as error:
        raise ConfigError(_no_answer(option, uri, error, "list and read")) from error
    if filesystem.type_name in _BUCKETS and not path.strip("/"):
        raise ConfigError(f"{option}={uri!r} names no bucket; expected {scheme}://bucket/prefix")
    return filesystem, path.rstrip("/")


def check_writable(uri: str, *, option: str) -> None:
    """Write a small file into the folder `uri`, read it and delete it.

    Raises:
        ConfigError: the storage cannot be reached, there is no such bucket, or one of the three is not allowed.
    """
    folder = RemoteFolder(uri, option=option, pauses=())
    name = f".hvp_ray-probe-{secrets.token_hex(8)}"
    try:
        folder.write(name, b"may hvp_ray write here?")
        if folder.read(name) is None:
            raise FileNotFoundError("what was written cannot be read")
        folder.delete(name)
    except OSError as error:
        raise ConfigError(_no_answer(option, uri, error, "list, read, write and delete in")) from error


class RemoteFolder:
    """The folder behind a URI. Nothing needs to be there. Methods may be called by several threads.

    Every method tries again after the pauses and then raises OSError.
    """

    def __init__(self, uri: str, *, option: str = "run.output", pauses: tuple[float, ...] | None = None) -> None:
        self.uri = uri
        self._filesystem, self._root = open_uri(uri, option=option, pauses=pauses)
        self._pauses = pauses

    def names(self, below: str = "") -> list[str]:
        """Return the names of all files, however deep, relative to the folder; those of `below` only, if given."""
        root = f"{self._root}/{below}".rstrip("/")
        selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        found = self._retried(lambda: self._filesystem.get_file_info(selector), f"listing {self.uri}")
        start = len(self._root) + 1
        names = (f.path[start:] for f in found if f.is_file and not f.path.endswith(".part"))
        return sorted(name for name in names if is_inside(name))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None: there is no such file."""
        try:
            return self._retried(lambda: self._read(name), f"reading {join_uri(self.uri, name)}")
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file, as a whole or not at all."""
        self._retried(lambda: self._write(name, content), f"writing {join_uri(self.uri, name)}")

    def delete(self, name: str) -> None:
        """Delete a file; it may be gone already."""
        try:
            self._retried(lambda: self._filesystem.delete_file(self._path(name)), f"deleting {self.uri}")
        except FileNotFoundError:
            pass

    def delete_all(self) -> None:
        """Delete the folder and what is in it; it may be gone already."""
        try:
            self._retried(lambda: self._filesystem.delete_dir(self._root), f"deleting {self.uri}")
        except FileNotFoundError:
            pass

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _read(self, name: str) -> bytes:
        with self._filesystem.open_input_stream(self._path(name)) as stream:
            content: bytes = stream.read()
            return content

    def _write(self, name: str, content: bytes | pa.Buffer) -> None:
        path = self._path(name)
        kind = self._filesystem.type_name
        if kind not in _BUCKETS:
            self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        # Buckets show an object when it is complete; a local file would be seen half written.
        target = f"{path}.part" if kind == "local" else path
        with self._filesystem.open_output_stream(target) as stream:
            stream.write(content)
        if target != path:
            self._filesystem.move(target, path)

    def _retried(self, action: Callable[[], T], what: str) -> T:
        try:
            return retried(action, what, pauses=self._pauses)
        except ValueError as error:  # pyarrow's, about a path
            raise OSError(first_line(error)) from error


def retried(action: Callable[[], T], what: str, *, pauses: tuple[float, ...] | None = None) -> T:
    """Do it, and again after each of the pauses while the storage fails.

    Args:
        action: may be done twice.
        what: for the warning.
        pauses: seconds; None: those of this file.

    Raises:
        FileNotFoundError: at once.
        OSError: the last failure.
    """
    for pause in (*(_PAUSES_SECONDS if pauses is None else pauses), None):
        try:
            return action()
        except (FileNotFoundError, ValueError, NotImplementedError):
            raise
        except (OSError, pa.ArrowException) as error:
            if pause is None:
                raise error if isinstance(error, OSError) else OSError(first_line(error)) from error
            logger.warning("%s: %s; tried again in %g s", what, first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def read_file(location: str, *, option: str = "run.output", pauses: tuple[float, ...] | None = None) -> bytes | None:
    """Return the content of a file, by path or URI; None: there is none.

    Raises:
        ConfigError: the URI cannot be used.
        OSError: it cannot be read.
    """
    if is_uri(location):
        folder, name = _split(location)
        return RemoteFolder(folder, option=option, pauses=pauses).read(name)
    try:
        return Path(location).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_file(
    location: str, content: bytes, *, option: str = "run.output", pauses: tuple[float, ...] | None = None
) -> None:
    """Write a file by path or URI, as a whole or not at all; folders are made.

    Raises:
        ConfigError: the URI cannot be used.
        OSError: it cannot be written.
    """
    if is_uri(location):
        folder, name = _split(location)
        RemoteFolder(folder, option=option, pauses=pauses).write(name, content)
        return
    path = Path(location)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def delete_folder(location: str) -> None:
    """Delete a folder by path or URI as far as that is possible; what stays is in nobody's way."""
    if not is_uri(location):
        shutil.rmtree(location, ignore_errors=True)
        return
    try:
        RemoteFolder(location, pauses=()).delete_all()
    except (ConfigError, OSError) as error:
        logger.warning("%s could not be deleted: %s", location, first_line(error))


def _split(uri: str) -> tuple[str, str]:
    path, mark, query = uri.partition("?")
    folder, _, name = path.rpartition("/")
    return folder + mark + query, name


def _no_answer(option: str, uri: str, error: Exception, rights: str) -> str:
    scheme = uri.partition("://")[0].lower()
    keys = place_of_credentials(scheme)
    return (
        f"{option}={uri!r} cannot be used: {first_line(error)}. The bucket or folder must be there, reachable, and this "
        f"account must be allowed to {rights} it" + (f"; keys are looked for {keys}" if keys else "")
    )
