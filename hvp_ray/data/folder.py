"""A folder of images: `folder/<class>/<anything>/image.jpg`, or images without classes directly in it."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvp_ray.data.source import UNLABELLED
from hvp_ray.errors import DataError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".tga",
)  # fmt: skip


class FolderSource:
    """Images in class folders; the class is the first folder below the root. Implements `Source`.

    Ids follow the sorted relative paths. Hidden files and folders are left out; links to folders are followed once.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        found = sorted(_find_images(str(root)))
        if not found:
            files = sum(len(names) for _, _, names in os.walk(root))
            raise DataError(
                f"no images in {root} ({files} files of other kinds); expected class folders with "
                f"{', '.join(IMAGE_SUFFIXES[:5])}, ... or *.parquet files"
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
        """Read whole files."""
        return [(self._root / self._paths[sample_id]).read_bytes() for sample_id in sample_ids]

    def describe(self, sample_id: int) -> str:
        """Return the file's path."""
        return str(self._root / self._paths[sample_id])


def _find_images(root: str) -> Iterator[tuple[str, int]]:
    """Yield (path relative to `root`, size in bytes) of every image file."""
    seen: set[str] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        real = os.path.realpath(os.path.join(root, relative))
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(os.path.join(root, relative)))
        except PermissionError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}; give read permission") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(relative, entry.name)
            if entry.is_dir():
                pending.append(path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                yield path, entry.stat().st_size
