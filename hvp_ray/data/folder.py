"""A folder of images: `folder/<class>/<anything>/image.jpg`, or images without classes directly in it.

If everything lies in one folder of the folder (`data/images/<class>/...`), classes are the folders in that one.
"""

import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvp_ray.data.image_files import PATHS_AT_ONCE, ImageFiles
from hvp_ray.data.image_suffixes import IMAGE_SUFFIXES, image_suffixes
from hvp_ray.data.listing import NO_FILE, Leftovers, walk_files
from hvp_ray.data.source import EXPECTED, UNLABELLED, Place, Source, renumber
from hvp_ray.errors import DataError, LabelError

logger = logging.getLogger(__name__)

_ARCHIVE_SUFFIXES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_TRAINING_SPLITS = ("train", "training")
_OTHER_SPLITS = ("val", "valid", "validation", "dev", "test", "testing", "eval")


def open_folder(place: Place) -> Source:
    """Return the images of a folder: the last format, so that whatever it cannot read is reported.

    Raises:
        DataError: there are no images. The message names what was found.
    """
    if place.path is None:
        raise DataError(
            f"data.source={place.location!r} has no Parquet files, no WebDataset (.tar) and no packed shards "
            f"({len(place.files.sizes)} files of other kinds). Single images are read from folders of this machine only: "
            f"pack them with hvp-ray pack FOLDER {place.location}"
        )
    if "*" in place.path.name:
        raise DataError(
            f"data.source={place.location!r}: no files match that are read; patterns are for *.parquet and *.tar"
        )
    if not place.path.is_file():
        suffixes = image_suffixes(place.config.channels)
        return FolderSource(place.path, max_image_bytes=place.max_image_bytes, suffixes=suffixes)
    if place.path.name.lower().endswith(_ARCHIVE_SUFFIXES):
        raise DataError(
            f"data.source={place.location!r} is a compressed archive, and those are not read; unpack it into a folder of "
            f"images, or write an uncompressed .tar"
        )
    raise DataError(f"data.source={place.location!r} is a file of no known format; expected {EXPECTED}")


class FolderSource(ImageFiles):
    """Images in class folders; the class is the first folder below the root.

    Ids follow the relative paths, sorted by their bytes and stored as one Arrow column. `listing.py` selects the files.
    """

    kind = "images in a folder"

    def __init__(self, root: Path, *, max_image_bytes: int, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> None:
        """List the images.

        Args:
            root: the folder.
            max_image_bytes: larger files are returned as no bytes.
            suffixes: endings of the names of images.

        Raises:
            DataError: there are none, there are several splits, or a folder cannot be read.
        """
        leftovers = Leftovers()
        paths, sizes = _collect(_find_images(str(root), leftovers, suffixes))
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
                f"no images in {root} ({leftovers.num_files} files of other kinds); expected {EXPECTED}"
                + (f". Left out: {found}" if found else "")
                + ("; give --data.channels to read arrays (.npy)" if leftovers.has_suffix((".npy",)) else "")
            )
        order = pc.sort_indices(paths)
        super().__init__(root, paths.take(order), sizes[order.to_numpy()], max_image_bytes=max_image_bytes)
        del paths, sizes, order
        pa.default_memory_pool().release_unused()  # memory of the sort
        shared = _shared_folder(self._paths)
        self._labels, self._class_names = _classes(self._paths, skip=len(shared))
        _refuse_splits(root / os.fsdecode(shared), self._class_names)
        if shared and (len(self._class_names) < 2 or self._labels.min() == UNLABELLED):
            self._labels, self._class_names = _classes(self._paths)  # all images are of one class
        self.has_labels = bool(self._class_names)

    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the index of each image's class folder, and the names of these folders, sorted.

        Raises:
            LabelError: there are no class folders.
        """
        if not self._class_names:
            raise LabelError(f"{self._root} has no labels: all images lie in it directly, none in a class folder")
        return self._labels.astype(np.int64), tuple(self._class_names)

    def shares_files_with(self, other: Source) -> bool:
        """Tell whether one of the two folders lies in the other one, which counts its images as its own."""
        if not isinstance(other, FolderSource):
            return super().shares_files_with(other)
        roots = [os.path.realpath(source._root) for source in (self, other)]
        for (outer, root), inner in (((self, roots[0]), roots[1]), ((other, roots[1]), roots[0])):
            if Path(inner).is_relative_to(root):
                below = os.fsencode(os.path.join(os.path.relpath(inner, root), "")) if inner != root else b""
                return bool(pc.any(pc.starts_with(outer._paths, below)).as_py())
        return False


def _collect(found: Iterator[tuple[str, int]]) -> tuple[pa.LargeBinaryArray, NDArray[np.int64]]:
    """Return paths and sizes in bytes as columns, with few Python objects at a time."""
    parts, sizes = [pa.array([], pa.large_binary())], [np.zeros(0, np.int64)]
    while some := list(islice(found, PATHS_AT_ONCE)):
        parts.append(pa.array([os.fsencode(path) for path, _ in some], pa.large_binary()))
        sizes.append(np.array([size for _, size in some], np.int64))
    return pa.concat_arrays(parts), np.concatenate(sizes)


def _classes(paths: pa.LargeBinaryArray, *, skip: int = 0) -> tuple[NDArray[np.int32], list[str]]:
    """Return the label of each path, [N], and the classes: the first folders after `skip` bytes of the path, sorted."""
    labels = np.full(len(paths), UNLABELLED, np.int32)
    index: dict[bytes, int] = {}
    for start in range(0, len(paths), PATHS_AT_ONCE):
        for place, path in enumerate(paths[start : start + PATHS_AT_ONCE].to_pylist(), start):
            name, slash, _ = path[skip:].partition(b"/")
            if slash:
                labels[place] = index.setdefault(name, len(index))
    names = sorted(index)
    ranks = {name: rank for rank, name in enumerate(names)}
    return renumber(labels, (ranks[name] for name in index)).astype(np.int32), [os.fsdecode(name) for name in names]


def _find_images(root: str, leftovers: Leftovers, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield (path relative to `root`, size in bytes) of every image file; count the others."""
    for path, entry in walk_files(root, leftovers):
        if not path.lower().endswith(suffixes):
            leftovers.add_file(path)
            continue
        try:
            num_bytes = entry.stat().st_size
        except OSError:  # deleted since it was listed
            leftovers.add(NO_FILE, path)
            continue
        yield path, num_bytes


def _shared_folder(paths: pa.LargeBinaryArray) -> bytes:
    """Return the folder that all of the sorted paths lie in, with its slash. Empty: the root."""
    first, last = (os.path.dirname(paths[index].as_py()) for index in (0, -1))
    shared = os.path.commonpath([first, last]) if first and last else b""
    return shared + b"/" if shared else b""


def _refuse_splits(place: Path, folders: list[str]) -> None:
    """Refuse a folder that has train/ and val/ as if they were classes.

    Args:
        place: the first folder that has images, or several folders with images.
        folders: names of the folders in it.

    Raises:
        DataError: there are a training split and another one.
    """
    names = {name.lower(): name for name in folders}
    training = next((names[split] for split in _TRAINING_SPLITS if split in names), None)
    others = [names[split] for split in _OTHER_SPLITS if split in names]
    if training is None or not others:
        return
    raise DataError(
        f"{place} has the folders of several splits ({', '.join([training, *others])}), and images of all of them would be "
        f"trained on. Give one for each purpose: --data.source {place / training} --data.test_source {place / others[0]}"
    )
