"""The files of a data set, on this machine or at a URI: listed once, read in ranges of bytes.

Paths and URIs both go through pyarrow.fs, so sources have one code for both. A read returns exactly the bytes asked for, or
raises StorageError, and the caller of a source retries. Every byte read is counted.
"""

import fnmatch
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pyarrow.fs as pafs

from hvp_ray.data.listing import (
    HIDDEN,
    MAX_MARK_BYTES,
    OF_RUNS,
    LeftOut,
    Leftovers,
    hidden_part,
    is_mark,
    walk_files,
)
from hvp_ray.errors import DataError, HvpRayError, first_line
from hvp_ray.files import OpenFile, is_inside, is_uri, open_uri, retried

_MAX_OPEN_FILES = 64


class FileSet:
    """The files below a folder, or one file, or those that a pattern in the last part of the path matches.

    Names are relative to the folder, with `/`, and in the same order wherever the files lie. Hidden files and folders, and
    folders of runs, are left out (`listing.py`).
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
            location: a path, or a URI (s3://, gs://, hf://, file://, or another of pyarrow.fs).
            suffixes: endings (in lower case) of the files to list in a folder on this machine.
            recursive: also those in folders of the folder.
            option: setting that gave it, for messages.

        Raises:
            ConfigError: the URI cannot be used.
            DataError: the location does not exist, or cannot be listed.
        """
        self.location = location
        self.is_remote = is_uri(location)
        self._suffixes = suffixes
        self._recursive = recursive
        self._open: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._last_change = 0
        self.leftovers = Leftovers()
        """Entries that were not listed; empty for a pattern."""
        self.num_bytes_read = 0
        """Bytes that the storage has returned."""
        self.is_single = False
        """Whether the location is that of one file."""
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
        """Location and last change of the files: the key of a cache of their content."""
        return f"{self.location} {self._root} {self._last_change}"

    def names(self, *suffixes: str) -> list[str]:
        """Return the names with one of these endings (in lower case)."""
        return [name for name in self.sizes if name.lower().endswith(suffixes)]

    def left_out_beside(self, used: Sequence[str]) -> tuple[LeftOut, ...]:
        """Return what was not listed, and the files that are not among `used`; nothing for a pattern."""
        leftovers = self.leftovers.copy()
        if self._pattern is None:
            for name in self.sizes.keys() - set(used):
                leftovers.add_file(name)
        return leftovers.entries()

    def shown(self, name: str) -> str:
        """Return the path or URI of a file, without parameters, for messages."""
        return self._shown_root if self.is_single else f"{self._shown_root.rstrip('/')}/{name}"

    def places(self, names: Sequence[str]) -> set[str]:
        """Return the locations of files: paths without links, or URIs."""
        shown = map(self.shown, names)
        return set(shown if self.is_remote else (os.path.realpath(Path(path).expanduser()) for path in shown))

    def open(self, name: str) -> OpenFile:
        """Return an open file; the last ones stay open.

        Raises:
            StorageError: it cannot be opened.
        """
        with self._lock:
            if name in self._open:
                self._open.move_to_end(name)
                return self._open[name]
        path = self._root if self.is_single else f"{self._root}/{name}"
        file = OpenFile(self._filesystem, path, size=self.sizes[name], shown=self.shown(name), count=self._count_read)
        with self._lock:
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

    def _count_read(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes_read += num_bytes

    def _list_local(self) -> dict[str, int]:
        root = Path(self._root)
        self.is_single = root.is_file()
        if self.is_single:
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
        self.is_single = top.is_file
        if self.is_single:
            self._last_change = top.mtime_ns or 0
            return {_last(self._root): top.size}
        found = self._filesystem.get_file_info(pafs.FileSelector(self._root, recursive=self._recursive))
        self._last_change = max((info.mtime_ns or 0 for info in found), default=0)
        start = len(self._root) + 1
        self.leftovers = Leftovers()  # drop those of a failed attempt
        sizes: dict[str, int] = {}
        hidden: set[str] = set()
        for info in found:
            name = info.path[start:]
            if part := hidden_part(name):
                hidden.add(part)
            elif info.is_file and name and is_inside(name):
                sizes[name] = info.size
        for name in hidden:
            self.leftovers.add(HIDDEN, name)
        return self._without_runs(sizes)

    def _without_runs(self, sizes: dict[str, int]) -> dict[str, int]:
        """Leave out folders of runs; a bucket has no comparisons."""
        runs = []
        for name, size in sizes.items():
            if name.endswith("/config.json") and size <= MAX_MARK_BYTES:
                with self._filesystem.open_input_stream(f"{self._root}/{name}") as stream:
                    if is_mark("config.json", stream.read()):
                        runs.append(name.removesuffix("config.json"))
        for run in runs:
            self.leftovers.add(OF_RUNS, run.rstrip("/"))
        return {name: size for name, size in sizes.items() if not name.startswith(tuple(runs))}


def _last(name: str) -> str:
    return name.rpartition("/")[2]
