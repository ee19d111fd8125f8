"""Images in files of their own on this machine, whose paths are known: the base of folders and image lists."""

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvp_ray.data.source import Source
from hvp_ray.files import StorageError

logger = logging.getLogger(__name__)

PATHS_AT_ONCE = 16_384
"""Paths that are Python objects at a time."""

_FAULTS_OF_ONE_FILE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.ENXIO,  # it has become a socket
)
"""Errors of opening a single file that is missing or forbidden while the storage works."""

_PROBES = 32
"""Files opened to tell a missing file from a missing storage."""


class ImageFiles(Source):
    """Images in single files. Paths are one Arrow column, sizes one array."""

    def __init__(
        self, root: Path, paths: pa.LargeBinaryArray, sizes: NDArray[np.int64], *, max_image_bytes: int
    ) -> None:
        """Keep the paths.

        Args:
            root: folder that relative paths start from.
            paths: [N], in the order of the sample ids.
            sizes: [N], in bytes.
            max_image_bytes: larger files are returned as no bytes.
        """
        self._root = root
        self._paths = paths
        self._sizes = sizes
        self._max_image_bytes = max_image_bytes
        self.num_samples, self.num_bytes = len(paths), int(sizes.sum())
        large = np.flatnonzero(sizes > max_image_bytes)
        if len(large):
            logger.warning(
                "%d images of %s have more than data.max_image_mib=%d MiB and count as unreadable, the first: %s",
                len(large),
                root,
                max_image_bytes // 2**20,
                self._path(int(large[0])),
            )

    def fingerprint(self) -> str:
        """Return a digest of relative paths and sizes."""
        digest = hashlib.sha256()
        for start in range(0, len(self._paths), PATHS_AT_ONCE):
            paths = self._paths[start : start + PATHS_AT_ONCE].to_pylist()
            sizes = self._sizes[start : start + PATHS_AT_ONCE].tolist()
            digest.update(b"".join(b"%b\0%d\n" % entry for entry in zip(paths, sizes, strict=True)))
        return digest.hexdigest()

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the files' bytes. No bytes: a file is too large, missing or forbidden, and counts as unreadable.

        Raises:
            OSError: reading failed.
            StorageError: no file can be opened, so the storage is missing rather than a file.
        """
        return [self._read_file(os.path.join(self._root, self._path(sample_id))) for sample_id in sample_ids]

    def shares_files_with(self, other: Source) -> bool:
        """Tell whether a file belongs to both sources."""
        return isinstance(other, ImageFiles) and not self._real_paths().isdisjoint(other._real_paths())

    def describe(self, sample_id: int) -> str:
        """Return the file's path."""
        return str(self._root / self._path(sample_id))

    def _real_paths(self) -> set[str]:
        """Return the paths of all files, with links in the names of folders resolved."""
        folders: dict[str, str] = {}
        found = set()
        for start in range(0, len(self._paths), PATHS_AT_ONCE):
            for path in self._paths[start : start + PATHS_AT_ONCE].to_pylist():
                folder, name = os.path.split(os.path.join(self._root, os.fsdecode(path)))
                if folder not in folders:
                    folders[folder] = os.path.realpath(folder)
                found.add(os.path.join(folders[folder], name))
        return found

    def _path(self, sample_id: int) -> str:
        return os.fsdecode(self._paths[sample_id].as_py())

    def _read_file(self, path: str) -> bytes:
        try:
            descriptor = _open_without_waiting(path)
        except ValueError:  # the path of a list has a NUL
            return b""
        except OSError as error:
            if error.errno not in _FAULTS_OF_ONE_FILE:
                raise
            if not self._has_open_files():
                raise StorageError(
                    f"none of the files below {self._root} can be opened, for instance: {error}"
                ) from error
            logger.warning("%s cannot be opened (%s) and counts as unreadable", path, error.strerror)
            return b""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > self._max_image_bytes:
            os.close(descriptor)
            return b""
        with open(descriptor, "rb") as file:
            return file.read(status.st_size + 1)  # some kernel files report 0 bytes and never end

    def _has_open_files(self) -> bool:
        """Tell whether any of `_PROBES` files, spread over the source, can be opened."""
        spread = np.unique(np.linspace(0, self.num_samples - 1, _PROBES).astype(np.int64))
        for sample_id in spread.tolist():
            try:
                os.close(_open_without_waiting(os.path.join(self._root, self._path(sample_id))))
            except OSError:
                continue
            return True
        return False


def _open_without_waiting(path: str) -> int:
    """Open for reading without blocking: a listed file may have become a pipe."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
