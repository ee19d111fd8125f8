"""The interface of data sources, and opening the one that `data.source` names.

A source returns encoded images by sample id. Every process that reads (view workers, evaluation) opens it anew, so it keeps
little state and is never sent. `formats.py` lists the formats. Each is a file with a class and a function that recognises it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.image_suffixes import image_suffixes
from hvp_ray.data.listing import LeftOut
from hvp_ray.errors import DataError, first_line
from hvp_ray.files import is_uri

UNLABELLED = -1
"""Label of an image without one."""

MAX_LABEL = 2**20 - 1
"""Evaluation keeps votes for every class up to the largest."""

PLAN = "packing.json"
"""A folder that has it, and no manifest, is being packed (`packing.py`)."""

DIGITS = "digits"
"""Location of the embedded data set."""

EXPECTED = (
    "`digits`, a folder of images, Parquet, WebDataset (.tar), a Hugging Face data set saved to disk, an image list (.csv, "
    ".tsv, .parquet), packed shards, or a URI"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """What `data.source` names, for the functions that recognise a format. Files are listed when they are needed."""

    location: str
    """Value of the option."""
    path: Path | None
    """Something on this machine. None: a URI, or `digits`."""
    config: DataConfig
    """Columns and limits."""
    cache_bytes: int
    """Disk of this node for what would otherwise be read again. 0: none, as images are read once, in order."""
    endings: tuple[str, ...]
    """Endings of the names of files that hold or describe images, of all formats."""

    @cached_property
    def files(self) -> FileSet:
        """Files with one of the endings; at a URI all files."""
        return FileSet(self.location, suffixes=None if self.path is None else self.endings)

    @property
    def has_images(self) -> bool:
        """Whether there are single images that are read. Those at a URI are not."""
        return self.files.leftovers.has_suffix(image_suffixes(self.config.channels))

    @property
    def max_image_bytes(self) -> int:
        """Larger images are returned as no bytes."""
        return self.config.max_image_mib * 2**20


class Source(ABC):
    """Encoded images, addressed by sample id 0..N-1. Ids are stable between processes and runs."""

    kind: str
    """Kind of the source, for people."""
    num_samples: int
    """N."""
    num_bytes: int
    """Bytes of all encoded images, known without reading them."""
    has_labels: bool
    """Whether any image may have a label, known without reading labels."""
    left_out: tuple[LeftOut, ...] = ()
    """Entries at the source that are not read."""
    block_starts: NDArray[np.int64] | None = None
    """First sample id of every group of images that lie together. None: there are no groups."""
    reads_whole_blocks: bool = False
    """Whether reading an image costs reading its whole block."""

    @abstractmethod
    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Read what `load_labels` and `load_class_names` return.

        Raises:
            LabelError: there are no labels, or they cannot be used. The message has the reason.
            DataError: the storage failed.
        """

    def load_labels(self) -> NDArray[np.int64]:
        """Return all labels, [N], `UNLABELLED` for an image without one. The first call reads them; see `read_labels`."""
        return self._labels_and_names[0]

    def load_class_names(self) -> tuple[str, ...]:
        """Return the class name of each label from 0 on. Empty: the source has numbers only. See `load_labels`."""
        return self._labels_and_names[1]

    @cached_property
    def _labels_and_names(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        return self.read_labels()

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest that changes when names, sizes or order of the images change."""

    @abstractmethod
    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the encoded images of these ids. No bytes: an image is missing, or larger than data.max_image_mib.

        Raises:
            DataError: the content of the source is damaged.
            OSError: the storage failed. The caller retries.
        """

    @abstractmethod
    def describe(self, sample_id: int) -> str:
        """Return the place of an image, for messages: a path, or file and row."""

    def places(self) -> set[str]:
        """Return the files that hold the images: paths without links, or URIs. Empty: each image is a file."""
        return set()

    def num_repeated_images(self) -> int:
        """Return how many images are files that are images of a smaller number, too. Copies of a file do not count."""
        return 0

    def shares_files_with(self, other: "Source") -> bool:
        """Tell whether a file belongs to both sources. Copies of a file do not count."""
        return not self.places().isdisjoint(other.places())


def renumber(labels: NDArray[np.integer[Any]], numbers: Iterable[int]) -> NDArray[np.int64]:
    """Replace each label i by the i-th number; `UNLABELLED` stays."""
    return np.array([*numbers, UNLABELLED], np.int64)[labels]  # UNLABELLED, -1, indexes the last entry


def open_source(source: str, config: DataConfig, *, in_order: bool = False) -> Source:
    """Open the source by the first format (`formats.py`) that recognises it.

    Args:
        source: value of `DataConfig.source`.
        config: columns and limits.
        in_order: images will be read once, in order, so nothing is cached on the disk.

    Raises:
        DataError: there is nothing usable at `source`. The message states what was found and what is expected.
        ConfigError: a URI that cannot be used.
    """
    if source.startswith(("http://", "https://")):
        raise DataError(
            f"data.source={source!r}: web pages are not listed; give hf://datasets/OWNER/NAME, s3://, gs://, or download it"
        )
    from hvp_ray.data.formats import FILE_ENDINGS, FORMATS  # its modules import this one

    try:
        place = Place(
            location=source,
            path=None if source == DIGITS or is_uri(source) else _check_path(source),
            config=config,
            cache_bytes=0 if in_order else config.block_cache_mib * 2**20,
            endings=FILE_ENDINGS,
        )
        return next(found for entry in FORMATS if (found := entry.recognise(place)) is not None)
    except OSError as error:
        raise DataError(f"data.source={source!r} cannot be read: {first_line(error)}") from error


def _check_path(source: str) -> Path:
    """Return the path of a source on this machine, if something that may be opened is there."""
    path = Path(source).expanduser()
    place = path.parent if "*" in path.name else path
    try:
        exists = place.exists()
    except OSError as error:
        raise DataError(f"data.source={source!r} cannot be read: {error.strerror}") from error
    if not exists:
        raise DataError(f"data.source={source!r} does not exist; expected {EXPECTED}")
    if not place.is_file() and not place.is_dir():
        raise DataError(f"data.source={source!r} is a pipe, a device or a socket; expected {EXPECTED}")
    return path
