"""A folder of images: `folder/<class>/<anything>/image.jpg`, or images without classes directly in it."""

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvp_ray.data.listing import NO_FILE, Leftovers, walk_files
from hvp_ray.data.source import UNLABELLED, Source, renumber
from hvp_ray.errors import DataError, LabelError
from hvp_ray.files import StorageError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga",
)  # fmt: skip

_PATHS_AT_ONCE = 16_384
_TRAINING_SPLITS = ("train", "training")
_OTHER_SPLITS = ("val", "valid", "validation", "dev", "test", "testing", "eval")

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


class FolderSource(Source):
    """Images in class folders; the class is the first folder below the root.

    Ids follow the relative paths, sorted by their bytes and stored as one Arrow column. `listing.py` selects the files.
    """

    kind = "images in a folder"

    def __init__(self, root: Path, *, max_image_bytes: int) -> None:
        """List the images.

        Args:
            root: the folder.
            max_image_bytes: larger files are returned as no bytes.

        Raises:
            DataError: there are none, there are several splits, or a folder cannot be read.
        """
        self._root = root
        self._max_image_bytes = max_image_bytes
        leftovers = Leftovers()
        paths, sizes = _collect(_find_images(str(root), leftovers))
        self.left_out = leftovers.entries()
        if leftovers.count(NO_FILE):
            logger.warning(
                "%d entries of %s are no files (broken links, loops, pipes, devices) and are left out, the first: %s",
                leftovers.count(NO_FILE),
                root,
                next(entry.example for entry in self.left_out if entry.reason == NO_FILE),
            )
        if not len(paths):
            found = ", ".join(f"{entry.count} {entry.reason}" for entry in self.left_out[:5])
            raise DataError(
                f"no images in {root} ({leftovers.num_files} files of other kinds); expected class folders with "
                f"{', '.join(IMAGE_SUFFIXES[:5])}, ..., *.parquet files, or packed shards"
                + (f". Left out: {found}" if found else "")
            )
        order = pc.sort_indices(paths)
        self._paths = paths.take(order)
        self._sizes = sizes[order.to_numpy()]
        large = np.flatnonzero(self._sizes > max_image_bytes)
        if len(large):
            logger.warning(
                "%d images of %s have more than data.max_image_mib=%d MiB and count as unreadable, the first: %s",
                len(large),
                root,
                max_image_bytes // 2**20,
                self._path(int(large[0])),
            )
        self.num_samples, self.num_bytes = len(self._paths), int(self._sizes.sum())
        self._labels, self._class_names = _classes(self._paths)
        self.has_labels = bool(self._class_names)
        _refuse_splits(root, self._paths, self._class_names)
        del paths, sizes, order
        pa.default_memory_pool().release_unused()  # memory of the sort

    def load_labels(self) -> NDArray[np.int64]:
        """Return the index of each image's class folder.

        Raises:
            LabelError: there are no class folders.
        """
        if not self._class_names:
            raise LabelError(f"{self._root} has no labels: all images lie in it directly, none in a class folder")
        return self._labels.astype(np.int64)

    def load_class_names(self) -> tuple[str, ...]:
        """Return the names of the class folders, sorted."""
        return tuple(self._class_names)

    def fingerprint(self) -> str:
        """Return a digest of relative paths and sizes."""
        digest = hashlib.sha256()
        for start in range(0, len(self._paths), _PATHS_AT_ONCE):
            paths = self._paths[start : start + _PATHS_AT_ONCE].to_pylist()
            sizes = self._sizes[start : start + _PATHS_AT_ONCE].tolist()
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
        """Tell whether one of the two folders lies in the other one, which counts its images as its own."""
        if not isinstance(other, FolderSource):
            return False
        roots = [os.path.realpath(source._root) for source in (self, other)]
        for (outer, root), inner in (((self, roots[0]), roots[1]), ((other, roots[1]), roots[0])):
            if Path(inner).is_relative_to(root):
                below = os.fsencode(os.path.join(os.path.relpath(inner, root), "")) if inner != root else b""
                return bool(pc.any(pc.starts_with(outer._paths, below)).as_py())
        return False

    def describe(self, sample_id: int) -> str:
        """Return the file's path."""
        return str(self._root / self._path(sample_id))

    def _path(self, sample_id: int) -> str:
        return os.fsdecode(self._paths[sample_id].as_py())

    def _read_file(self, path: str) -> bytes:
        try:
            descriptor = _open_without_waiting(path)
        except OSError as error:
            if error.errno not in _FAULTS_OF_ONE_FILE:
                raise
            if not self._has_open_files():
                raise StorageError(
                    f"none of the files below {self._root} can be opened, for instance: {error}"
                ) from error
            logger.warning("%s cannot be opened (%s) and counts as unreadable", path, error.strerror)
            return b""
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > self._max_image_bytes:
                return b""
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


def _collect(found: Iterator[tuple[str, int]]) -> tuple[pa.LargeBinaryArray, NDArray[np.int64]]:
    """Return paths and sizes in bytes as columns, with few Python objects at a time."""
    parts, sizes = [pa.array([], pa.large_binary())], [np.zeros(0, np.int64)]
    while some := list(islice(found, _PATHS_AT_ONCE)):
        parts.append(pa.array([os.fsencode(path) for path, _ in some], pa.large_binary()))
        sizes.append(np.array([size for _, size in some], np.int64))
    return pa.concat_arrays(parts), np.concatenate(sizes)


def _classes(paths: pa.LargeBinaryArray, *, skip: int = 0) -> tuple[NDArray[np.int32], list[str]]:
    """Return the label of each path, [N], and the classes: the first folders after `skip` bytes of the path, sorted."""
    labels = np.full(len(paths), UNLABELLED, np.int32)
    index: dict[bytes, int] = {}
    for start in range(0, len(paths), _PATHS_AT_ONCE):
        for place, path in enumerate(paths[start : start + _PATHS_AT_ONCE].to_pylist(), start):
            name, slash, _ = path[skip:].partition(b"/")
            if slash:
                labels[place] = index.setdefault(name, len(index))
    names = sorted(index)
    ranks = {name: rank for rank, name in enumerate(names)}
    return renumber(labels, (ranks[name] for name in index)).astype(np.int32), [os.fsdecode(name) for name in names]


def _find_images(root: str, leftovers: Leftovers) -> Iterator[tuple[str, int]]:
    """Yield (path relative to `root`, size in bytes) of every image file; count the others."""
    for path, entry in walk_files(root, leftovers):
        if not path.lower().endswith(IMAGE_SUFFIXES):
            leftovers.add_file(path)
            continue
        try:
            num_bytes = entry.stat().st_size
        except OSError:  # deleted since it was listed
            leftovers.add(NO_FILE, path)
            continue
        yield path, num_bytes


def _refuse_splits(root: Path, paths: pa.LargeBinaryArray, class_names: list[str]) -> None:
    """Refuse a folder that has train/ and val/ as if they were classes.

    Args:
        root: root of the source.
        paths: relative, sorted.
        class_names: the first folders.

    Raises:
        DataError: the first level that has several folders has a training split and another one.
    """
    first, last = (os.path.dirname(paths[index].as_py()) for index in (0, -1))
    shared = os.path.commonpath([first, last]) if first and last else b""
    folders = class_names if not shared else _classes(paths, skip=len(shared) + 1)[1]
    names = {name.lower(): name for name in folders}
    training = next((names[split] for split in _TRAINING_SPLITS if split in names), None)
    others = [names[split] for split in _OTHER_SPLITS if split in names]
    if training is None or not others:
        return
    place = root / os.fsdecode(shared)
    raise DataError(
        f"{place} has the folders of several splits ({', '.join([training, *others])}), and images of all of them would be "
        f"trained on. Give one for each purpose: --data.source {place / training} --data.test_source {place / others[0]}"
    )
