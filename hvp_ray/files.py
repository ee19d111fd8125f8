"""Files on this machine or behind a URI (s3://, gs://, abfs://, hdfs://, file://), by pyarrow.fs.

One layer for everything that reads or writes files by location: `Folder` for whole files, `OpenFile` for ranges of bytes.
Storage failures leave this file as OSError, and URIs are retried with a warning (`retried`). A URI that cannot be used is a
ConfigError that names the remedy.
"""

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from hvp_ray.credentials import place_of_credentials, refuse_credentials
from hvp_ray.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSES_SECONDS = (1.0, 3.0, 10.0)
"""Retry delays for a URI. The libraries behind pyarrow also retry for some seconds within each attempt."""

_GCS_PATIENCE = "retry_limit_seconds=60"
"""Limit on Google's own retries, without which an attempt takes 15 minutes to fail."""

_BUCKETS = ("s3", "gcs", "abfs")
"""Storages in which a file needs no existing folder."""


class StorageError(OSError):
    """The storage failed, not the content of a file. A retry may help."""


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


def split_location(location: str) -> tuple[str, str]:
    """Return the folder of a file or folder, and its name: the opposite of `place_in`."""
    if not is_uri(location):
        return str(Path(location).parent), Path(location).name
    path, mark, query = location.partition("?")
    folder, _, name = path.rstrip("/").rpartition("/")
    return folder + mark + query, name


def is_inside(name: str) -> bool:
    """Tell whether a name stays in its folder on the local disk too; a bucket may hold any name."""
    return not name.startswith("/") and ".." not in name.split("/")


def open_uri(uri: str, *, option: str, pauses: tuple[float, ...] | None = None) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI, and the path in it.

    Args:
        uri: a URI.
        option: setting that gave it, for messages.
        pauses: see `retried`.

    Raises:
        ConfigError: credentials in it, an unknown scheme or parameter, or the storage does not answer.
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
    folder = Folder(uri, option=option, pauses=())
    name = f".hvp_ray-probe-{secrets.token_hex(8)}"
    try:
        folder.write(name, b"may hvp_ray write here?")
        if folder.read(name) is None:
            raise FileNotFoundError("what was written cannot be read")
        folder.delete(name)
    except OSError as error:
        raise ConfigError(_no_answer(option, uri, error, "list, read, write and delete in")) from error


class Folder:
    """A folder, by path or URI. It need not exist. Several threads may call its methods.

    Every method of a URI's folder retries after the pauses and then raises OSError.
    """

    def __init__(self, location: str, *, option: str = "run.output", pauses: tuple[float, ...] | None = None) -> None:
        """Open the folder.

        Args:
            location: a path or a URI.
            option: setting that gave it, for messages.
            pauses: see `retried`. A path has none.

        Raises:
            ConfigError: the URI cannot be used.
        """
        self.location = location
        if is_uri(location):
            self._filesystem, self._root = open_uri(location, option=option, pauses=pauses)
            self._pauses = pauses
        else:
            self._filesystem, self._root = pafs.LocalFileSystem(), str(Path(location).absolute())
            self._pauses = ()

    def names(self, below: str = "", *, unfinished: bool = False) -> list[str]:
        """Return the names of all files, however deep, relative to the folder.

        Args:
            below: a folder in it, for the names of its files alone.
            unfinished: also those that a process began to write on a disk and did not finish (`.part`).
        """
        root = f"{self._root}/{below}".rstrip("/")
        selector = pafs.FileSelector(root, recursive=True, allow_not_found=True)
        found = self._retried(lambda: self._filesystem.get_file_info(selector), f"listing {self.location}")
        start = len(self._root) + 1
        names = (f.path[start:] for f in found if f.is_file and (unfinished or not f.path.endswith(".part")))
        return sorted(name for name in names if is_inside(name))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None: there is no such file."""
        try:
            return self._retried(lambda: self._read(name), f"reading {place_in(self.location, name)}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write a file, as a whole or not at all."""
        self._retried(lambda: self._write(name, content), f"writing {place_in(self.location, name)}")

    def delete(self, name: str) -> None:
        """Delete a file; a missing one is no error."""
        try:
            self._retried(lambda: self._filesystem.delete_file(f"{self._root}/{name}"), f"deleting {self.location}")
        except FileNotFoundError:
            pass

    def delete_all(self) -> None:
        """Delete the folder and its content; a missing one is no error."""
        try:
            self._retried(lambda: self._filesystem.delete_dir(self._root), f"deleting {self.location}")
        except FileNotFoundError:
            pass

    def _read(self, name: str) -> bytes:
        with self._filesystem.open_input_stream(f"{self._root}/{name}", compression=None) as stream:
            content: bytes = stream.read()
            return content

    def _write(self, name: str, content: bytes | pa.Buffer) -> None:
        path = f"{self._root}/{name}"
        kind = self._filesystem.type_name
        if kind not in _BUCKETS:
            self._filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        # Buckets show an object when it is complete; a local file would be visible half written.
        target = f"{path}.part" if kind == "local" else path
        with self._filesystem.open_output_stream(target, compression=None) as stream:
            stream.write(content)
        if target != path:
            self._filesystem.move(target, path)

    def _retried(self, action: Callable[[], T], what: str) -> T:
        try:
            return retried(action, what, pauses=self._pauses)
        except ValueError as error:  # pyarrow's, about a path
            raise OSError(first_line(error)) from error


def retried(action: Callable[[], T], what: str, *, pauses: tuple[float, ...] | None = None) -> T:
    """Call `action`; while the storage fails, retry after each of the pauses.

    Args:
        action: function that may run more than once.
        what: description of the action, for the warning.
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
            logger.warning("%s: %s; retrying in %g s", what, first_line(error), pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def read_file(location: str, *, option: str = "run.output", pauses: tuple[float, ...] | None = None) -> bytes | None:
    """Return the content of a file, by path or URI; None: there is none.

    Raises:
        ConfigError: the URI cannot be used.
        OSError: it cannot be read.
    """
    folder, name = split_location(location)
    return Folder(folder, option=option, pauses=pauses).read(name)


def write_file(
    location: str, content: bytes, *, option: str = "run.output", pauses: tuple[float, ...] | None = None
) -> None:
    """Write a file by path or URI, as a whole or not at all; missing folders are created.

    Raises:
        ConfigError: the URI cannot be used.
        OSError: it cannot be written.
    """
    folder, name = split_location(location)
    Folder(folder, option=option, pauses=pauses).write(name, content)


def delete_folder(location: str) -> None:
    """Delete a folder by path or URI as far as possible; a failure is a warning."""
    if not is_uri(location):
        shutil.rmtree(location, ignore_errors=True)
        return
    try:
        Folder(location, pauses=()).delete_all()
    except (ConfigError, OSError) as error:
        logger.warning("%s could not be deleted: %s", location, first_line(error))


class OpenFile:
    """One file, open to read ranges of bytes. Several threads may share it."""

    def __init__(
        self, filesystem: pafs.FileSystem, path: str, *, size: int, shown: str, count: Callable[[int], None]
    ) -> None:
        """Open the file.

        Args:
            filesystem: file system of the file.
            path: its path there.
            size: bytes, as listed.
            shown: path or URI, for messages.
            count: called with the number of bytes of each read.

        Raises:
            StorageError: it cannot be opened.
        """
        self.size = size
        self.shown = shown
        self._count = count
        self._one_at_a_time = threading.Lock()
        try:
            handler = getattr(filesystem, "handler", None)
            self._raw: Any
            if isinstance(handler, pafs.FSSpecHandler):
                # fsspec's files prefetch megabytes for every small range by default.
                self._raw = handler.fs.open(path, "rb", cache_type="none")
            else:
                self._raw = filesystem.open_input_file(path)
        except Exception as error:
            raise StorageError(f"{shown}: {first_line(error)}") from error

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Return `num_bytes` bytes from `offset` on.

        Raises:
            StorageError: the storage failed, or the file ends early.
        """
        try:
            content = self._read(offset, num_bytes)
        except Exception as error:
            # fsspec has many libraries, and each has its own errors.
            raise StorageError(f"{self.shown}: {first_line(error)}") from error
        self._count(len(content))
        if len(content) != num_bytes:
            raise StorageError(
                f"{self.shown} ends {num_bytes - len(content)} bytes too early (wanted {num_bytes} from byte {offset})"
            )
        return content

    def _read(self, offset: int, num_bytes: int) -> bytes:
        if hasattr(self._raw, "read_at"):
            content: bytes = self._raw.read_at(num_bytes, offset)
            return content
        with self._one_at_a_time:
            self._raw.seek(offset)
            return bytes(self._raw.read(num_bytes))


def _no_answer(option: str, uri: str, error: Exception, rights: str) -> str:
    scheme = uri.partition("://")[0].lower()
    keys = place_of_credentials(scheme)
    return (
        f"{option}={uri!r} cannot be used: {first_line(error)}. The bucket or folder must exist and be reachable, and this "
        f"account must be allowed to {rights} it" + (f"; keys are looked for {keys}" if keys else "")
    )
