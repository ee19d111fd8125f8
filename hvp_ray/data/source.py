"""The interface of data sources, and opening the one that `data.source` names.

A source returns encoded images by sample id. Every process that reads (view workers, evaluation) opens it anew, so it keeps
little state and is never sent.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.listing import LeftOut
from hvp_ray.errors import DataError, first_line
from hvp_ray.files import is_uri

UNLABELLED = -1
"""Label of an image without one."""

MAX_LABEL = 2**20 - 1
"""Evaluation keeps votes for every class up to the largest."""

PLAN = "packing.json"
"""A folder that has it, and no manifest, is being packed (`packing.py`)."""

ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


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
    def load_labels(self) -> NDArray[np.int64]:
        """Return all labels, [N], `UNLABELLED` for an image without one. The first call reads them.

        Raises:
            LabelError: there are no labels, or they cannot be used. The message has the reason.
            DataError: the storage failed.
        """

    @abstractmethod
    def load_class_names(self) -> tuple[str, ...]:
        """Return the class name of each label from 0 on. Empty: the source has numbers only.

        Raises:
            LabelError, DataError: as `load_labels`.
        """

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

    def shares_files_with(self, other: "Source") -> bool:
        """Tell whether a file belongs to both sources, as far as their kind can tell."""
        return False


def renumber(labels: NDArray[np.integer[Any]], numbers: Iterable[int]) -> NDArray[np.int64]:
    """Replace each label i by the i-th number; `UNLABELLED` stays."""
    return np.array([*numbers, UNLABELLED], np.int64)[labels]  # UNLABELLED, -1, indexes the last entry


def open_source(source: str, config: DataConfig, *, in_order: bool = False) -> Source:
    """Open `digits`, a folder of images in class folders, Parquet in the Hugging Face image layout, or packed shards.

    Args:
        source: value of `DataConfig.source`.
        config: columns and limits.
        in_order: images will be read once, in order, so nothing is cached on the disk.

    Raises:
        DataError: there is nothing usable at `source`. The message states what was found and what is expected.
        ConfigError: a URI that cannot be used.
    """
    if source == "digits":
        from hvp_ray.data.digits import DigitsSource  # imports scikit-learn, which takes seconds

        return DigitsSource()
    try:
        return _open_files(source, config, 0 if in_order else config.block_cache_mib * 2**20)
    except OSError as error:
        raise DataError(f"data.source={source!r} cannot be read: {first_line(error)}") from error


def _open_files(source: str, config: DataConfig, cache_bytes: int) -> Source:
    from hvp_ray.data.file_set import FileSet
    from hvp_ray.data.folder import IMAGE_SUFFIXES, FolderSource
    from hvp_ray.data.parquet import PARQUET_SUFFIXES, ParquetSource, may_hold_images
    from hvp_ray.data.shard_format import MANIFEST
    from hvp_ray.data.shards import ShardSource

    if source.startswith(("http://", "https://")):
        raise DataError(
            f"data.source={source!r}: web pages are not listed; give hf://datasets/OWNER/NAME, s3://, gs://, or download it"
        )
    path = None if is_uri(source) else _check_path(source)
    is_packed = path is not None and (path / MANIFEST).is_file()
    if is_packed or path is None:
        files = FileSet(source, recursive=not is_packed)
    else:
        files = FileSet(source, suffixes=PARQUET_SUFFIXES)
    if MANIFEST in files.sizes:
        return ShardSource(files, cache_bytes=cache_bytes, max_image_bytes=config.max_image_mib * 2**20)
    has_images = files.leftovers.has_suffix(IMAGE_SUFFIXES)
    if files.names(*PARQUET_SUFFIXES) and (not has_images or may_hold_images(files, config)):
        return ParquetSource(files, config, cache_bytes=cache_bytes)
    if PLAN in files.sizes or (path is not None and (path / PLAN).is_file()):
        raise DataError(
            f"data.source={source!r} is not packed completely; give the command of hvp-ray pack again to continue"
        )
    if path is None:
        raise DataError(
            f"data.source={source!r} has no Parquet files and no packed shards ({len(files.sizes)} files of other kinds). "
            f"Single images are read from folders of this machine only: pack them with hvp-ray pack FOLDER {source}"
        )
    if "*" in path.name:
        raise DataError(f"data.source={source!r}: no Parquet files match; patterns are for *.parquet")
    if path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise DataError(
            f"data.source={source!r} is an archive, and archives are not read; unpack it into a folder of images, or give "
            f"Parquet"
        )
    if path.is_file():
        raise DataError(f"data.source={source!r} is a file, but not Parquet; expected *.parquet or a folder of images")
    return FolderSource(path, max_image_bytes=config.max_image_mib * 2**20)


def _check_path(source: str) -> Path:
    """Return the path of a source on this machine, if something that may be opened is there."""
    path = Path(source).expanduser()
    place = path.parent if "*" in path.name else path
    try:
        exists = place.exists()
    except OSError as error:
        raise DataError(f"data.source={source!r} cannot be read: {error.strerror}") from error
    if not exists:
        raise DataError(
            f"data.source={source!r} does not exist; expected `digits`, a folder, Parquet, packed shards, or a URI"
        )
    if not place.is_file() and not place.is_dir():
        raise DataError(f"data.source={source!r} is a pipe, a device or a socket; expected a folder or a Parquet file")
    return path
