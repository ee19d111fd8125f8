"""A folder of images: `folder/<class>/<anything>/image.jpg`, or images without classes directly in it."""

import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvp_ray.data.source import UNLABELLED
from hvp_ray.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".tga",
)  # fmt: skip


class FolderSource:
    """Images in class folders; the class is the first folder below the root. Implements `Source`.

    Ids follow the sorted relative paths. Hidden files and folders are left out. Links to files and to folders are followed,
    also out of the root, each folder once; a link to a folder that holds the root is not, nor is anything opened that is no
    file (pipes, devices, sockets).
    """

    def __init__(self, root: Path, *, max_image_bytes: int) -> None:
        """Find the images.

        Args:
            root: the folder.
            max_image_bytes: larger files are returned as no bytes.

        Raises:
            DataError: there are none, or a folder cannot be read.
        """
        self._root = root
        self._max_image_bytes = max_image_bytes
        left_out: list[str] = []
        found = sorted(_find_images(str(root), left_out))
        if left_out:
            logger.warning(
                "%d entries of %s are no files (broken links, loops, pipes, devices) and are left out, the first: %s",
                len(left_out),
                root,
                min(left_out),
            )
        if not found:
            files = sum(len(names) for _, _, names in os.walk(root))
            raise DataError(
                f"no images in {root} ({files} files of other kinds); expected class folders with "
                f"{', '.join(IMAGE_SUFFIXES[:5])}, ... or *.parquet files"
            )
        large = [path for path, size in found if size > max_image_bytes]
        if large:
            logger.warning(
                "%d images of %s have more than data.max_image_mib=%d MiB and count as unreadable, the first: %s",
                len(large),
                root,
                max_image_bytes // 2**20,
                large[0],
            )
        self._paths = [path for path, _ in found]
        self._sizes = np.array([size for _, size in found], dtype=np.int64)
        classes = [path.split(os.sep, 1)[0] if os.sep in path else None for path in self._paths]
        names = sorted({name for name in classes if name is not None})
        index = {name: number for number, name in enumerate(names)}
        self._labels = np.array([UNLABELLED if c is None else index[c] for c in classes], dtype=np.int64)
        self.class_names = names

    @property
    def num_samples(self) -> int:
        """Number of image files."""
        return len(self._paths)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Index of the class folder; None where there are no class folders."""
        return self._labels if self.class_names else None

    @property
    def block_starts(self) -> NDArray[np.int64] | None:
        """None: files are opened one by one."""
        return None

    def fingerprint(self) -> str:
        """Digest of relative paths and sizes."""
        digest = hashlib.sha256()
        for path, size in zip(self._paths, self._sizes.tolist(), strict=True):
            digest.update(f"{path}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the files' bytes; larger than allowed, or no file any more: no bytes, which counts as unreadable."""
        return [self._read_file(os.path.join(self._root, self._paths[sample_id])) for sample_id in sample_ids]

    def describe(self, sample_id: int) -> str:
        """Return the file's path."""
        return str(self._root / self._paths[sample_id])

    def _read_file(self, path: str) -> bytes:
        # Without waiting: what was a file when it was found may have become a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > self._max_image_bytes:
                return b""
            return file.read(status.st_size + 1)  # some files of the kernel's say 0 bytes and have no end


def _find_images(root: str, left_out: list[str]) -> Iterator[tuple[str, int]]:
    """Yield (path relative to `root`, size in bytes) of every image file; add what is no file to `left_out`."""
    seen: set[str] = set()
    real_root = os.path.realpath(root)
    pending = [""]
    while pending:
        relative = pending.pop()
        real = os.path.realpath(os.path.join(root, relative))
        if real in seen:
            continue
        seen.add(real)
        if relative and os.path.commonpath([real, real_root]) == real:
            left_out.append(relative)
            continue
        try:
            entries = list(os.scandir(os.path.join(root, relative)))
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}; give read permission") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(relative, entry.name)
            try:
                status = entry.stat()
            except OSError:  # a link to nothing, to itself, or to where we may not go
                left_out.append(path)
                continue
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                if stat.S_ISREG(status.st_mode):
                    yield path, status.st_size
                else:
                    left_out.append(path)
