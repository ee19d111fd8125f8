"""The files of a data set, on this machine or behind a URI, read in ranges of bytes.

Paths and URIs go the same way (pyarrow.fs), so a source has one code for both. Whoever reads gets exactly the bytes that were
asked for, or a `StorageError`, which the caller of a source repeats; every byte that leaves the storage is counted.
"""

import fnmatch
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from hvp_ray.data.listing import HIDDEN, OF_RUNS, LeftOut, Leftovers, is_hidden, is_mark, walk_files
from hvp_ray.errors import DataError, HvpRayError, first_line
from hvp_ray.remote_files import is_inside, is_uri, open_uri, retried

_MAX_OPEN_FILES = 64
_MAX_MARK_BYTES = 4 * 2**20


class StorageError(OSError):
    """The storage failed, not the content of a file: trying again may help."""


class OpenFile:
    """One file, open for reading. Threads may share it."""

    def __init__(self, files: "FileSet", name: str) -> None:
        self._files = files
        self.shown = files.shown(name)
        """Path or URI, for messages."""
        self._raw = files.open_raw(name)
        self.size = files.num_bytes_of(name)
        """Bytes, as listed."""
        self._one_at_a_time = threading.Lock()

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Return so many bytes from `offset` on.

        Raises:
            StorageError: the storage failed, or the file ends before.
        """
        try:
            content = self._read(offset, num_bytes)
        except Exception as error:
            # Behind fsspec there are many libraries, and each has errors of its own.
            raise StorageError(f"{self.shown}: {first_line(error)}") from error
        self._files.count(len(content))
        if len(content) != num_bytes:
            raise StorageError(
                f"{self.shown} ends {num_bytes - len(content)} bytes too early (wanted {num_bytes} from byte {offset})"
            )
        return content

    def close(self) -> None:
        """Let the file go."""
        self._raw.close()

    def _read(self, offset: int, num_bytes: int) -> bytes:
        if hasattr(self._raw, "read_at"):
            content: bytes = self._raw.read_at(num_bytes, offset)
            return content
        with self._one_at_a_time:
            self._raw.seek(offset)
            return bytes(self._raw.read(num_bytes))


class FileSet:
    """The files below a folder, or one file, or those that a pattern in the last part of the path matches.

    Names are relative to the folder, with `/`, and in the same order wherever the files lie. Hidden files and folders, and
    folders of runs, are left out (see `listing.py`).
    """

    def __init__(
        self,
        location: str,
        *,
        suffixes: tuple[str, ...] | None = None,
        recursive: bool = True,
        option: str = "data.source",
    ) -> None:
        """List the files.

        Args:
            location: a path, or a URI (s3://, gs://, hf://, file://, whatever pyarrow.fs knows).
            suffixes: of a folder on this machine, only files with one of these endings (in lower case).
            recursive: also those in folders of the folder.
            option: what it was given by, for messages.

        Raises:
            ConfigError: the URI cannot be used.
            DataError: there is nothing there, or it cannot be listed.
        """
        self.location = location
        self.is_remote = is_uri(location)
        self._suffixes = suffixes
        self._recursive = recursive
        self._open: OrderedDict[str, OpenFile] = OrderedDict()
        self._count = threading.Lock()
        self._last_change = 0
        self.leftovers = Leftovers()
        """What was not listed; of a pattern: nothing."""
        self.num_bytes_read = 0
        """Bytes that the storage has handed out."""
        path, mark, query = location.partition("?") if self.is_remote else (location, "", "")
        folder, _, last = path.rpartition("/")
        self._pattern = last if "*" in last else None
        if self._pattern is not None:
            path = folder or ("." if not path.startswith("/") else "/")
        try:
            if self.is_remote:
                self._filesystem, self._root = open_uri(path + mark + query, option=option)
                found = retried(self._list_remote, f"listing {location}")
            else:
                self._filesystem, self._root = pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())
                found = self._list_local()
        except HvpRayError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{option}={location!r} does not exist: {first_line(error)}") from error
        except Exception as error:
            raise DataError(f"{option}={location!r} cannot be listed: {first_line(error)}") from error
        self._shown_root = path if self.is_remote else str(Path(path).expanduser())
        if self._pattern is not None:
            self.leftovers = Leftovers()
            found = {name: size for name, size in found.items() if fnmatch.fnmatchcase(_last(name), self._pattern)}
        self.sizes: dict[str, int] = dict(sorted(found.items(), key=lambda entry: entry[0].split("/")))
        """Name -> bytes, sorted by folder and name."""

    @property
    def state(self) -> str:
        """Where the files are and when one last changed: what a cache of their content goes by."""
        return f"{self.location} {self._root} {self._last_change}"

    def names(self, *suffixes: str) -> list[str]:
        """Return the names with one of these endings (in lower case)."""
        return [name for name in self.sizes if name.lower().endswith(suffixes)]

    def left_out_beside(self, used: Sequence[str]) -> tuple[LeftOut, ...]:
        """Return what was not listed, and the files that are not among `used`; of a pattern: nothing."""
        leftovers = self.leftovers.copy()
        if self._pattern is None:
            for name in self.sizes.keys() - set(used):
                leftovers.add_file(name)
        return leftovers.entries()

    def num_bytes_of(self, name: str) -> int:
        """Return the size of a file as listed, bytes."""
        return self.sizes[name]

    def shown(self, name: str) -> str:
        """Return the path or URI of a file, without parameters, for messages."""
        return self._shown_root if self._is_single else f"{self._shown_root.rstrip('/')}/{name}"

    def places(self, names: Sequence[str]) -> set[str]:
        """Return where files are: paths without links, or URIs."""
        shown = map(self.shown, names)
        return set(shown if self.is_remote else (os.path.realpath(Path(path).expanduser()) for path in shown))

    def open(self, name: str) -> OpenFile:
        """Return an open file; the last ones stay open.

        Raises:
            StorageError: it cannot be opened.
        """
        with self._count:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
        file = OpenFile(self, name)
        with self._count:
            self._open[name] = file
            if len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)  # closed when the last thread that reads it is done
        return file

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return a small file as a whole.

        Raises:
            StorageError: it cannot be read.
            DataError: it has more than `max_bytes`.
        """
        if self.sizes[name] > max_bytes:
            raise DataError(f"{self.shown(name)} has {self.sizes[name]} bytes; expected at most {max_bytes}")
        return retried(lambda: self.open(name).read_at(0, self.sizes[name]), f"reading {self.shown(name)}")

    def open_raw(self, name: str) -> Any:
        """Return the file of the library that serves this storage."""
        path = self._root if self._is_single else f"{self._root}/{name}"
        try:
            handler = getattr(self._filesystem, "handler", None)
            if isinstance(handler, pafs.FSSpecHandler):
                # fsspec's files read megabytes ahead of every small range unless told not to.
                return handler.fs.open(path, "rb", cache_type="none")
            return self._filesystem.open_input_file(path)
        except Exception as error:
            raise StorageError(f"{self.shown(name)}: {first_line(error)}") from error

    def count(self, num_bytes: int) -> None:
        """Add to `num_bytes_read`."""
        with self._count:
            self.num_bytes_read += num_bytes

    def _list_local(self) -> dict[str, int]:
        root = Path(self._root)
        self._is_single = root.is_file()
        if self._is_single:
            self._last_change = root.stat().st_mtime_ns
            return {root.name: root.stat().st_size}
        if not root.is_dir():
            raise FileNotFoundError(f"no file or folder {root}")
        sizes: dict[str, int] = {}
        for name, entry in walk_files(str(root), self.leftovers, recursive=self._recursive):
            if self._suffixes is None or name.lower().endswith(self._suffixes):
                status = entry.stat()
                sizes[name] = status.st_size
                self._last_change = max(self._last_change, status.st_mtime_ns)
            else:
                self.leftovers.add_file(name)
        return sizes

    def _list_remote(self) -> dict[str, int]:
        top = self._filesystem.get_file_info(self._root)
        self._is_single = top.is_file
        if self._is_single:
            self._last_change = top.mtime_ns or 0
            return {_last(self._root): top.size}
        found = self._filesystem.get_file_info(pafs.FileSelector(self._root, recursive=self._recursive))
        self._last_change = max((info.mtime_ns or 0 for info in found), default=0)
        start = len(self._root) + 1
        self.leftovers = Leftovers()  # an attempt may have failed half way
        sizes: dict[str, int] = {}
        hidden: set[str] = set()
        for info in found:
            name = info.path[start:]
            if is_hidden(name):
                hidden.add(_hidden_part(name))
            elif info.is_file and name and is_inside(name):
                sizes[name] = info.size
        for name in hidden:
            self.leftovers.add(HIDDEN, name)
        return self._without_runs(sizes)

    def _without_runs(self, sizes: dict[str, int]) -> dict[str, int]:
        """Leave out folders of runs; a bucket has no comparisons."""
        runs = []
        for name, size in sizes.items():
            if name.endswith("/config.json") and size <= _MAX_MARK_BYTES:
                with self._filesystem.open_input_stream(f"{self._root}/{name}") as stream:
                    if is_mark("config.json", stream.read()):
                        runs.append(name.removesuffix("config.json"))
        for run in runs:
            self.leftovers.add(OF_RUNS, run.rstrip("/"))
        return {name: size for name, size in sizes.items() if not name.startswith(tuple(runs))}


def _hidden_part(name: str) -> str:
    """Return the hidden file or folder itself."""
    parts = name.split("/")
    return "/".join(parts[: next(index for index, part in enumerate(parts, 1) if part.startswith("."))])


def _last(name: str) -> str:
    return name.rpartition("/")[2]
