"""What a data source is, and how `data.source` names one.

A source hands out encoded images by sample id. It is opened anew in every process that reads (view workers,
evaluation), so its state stays small and never travels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.errors import DataError

UNLABELLED = -1
"""Label of an image without one."""

REMOTE_SCHEMES = ("hf://", "s3://", "gs://", "http://", "https://")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@runtime_checkable
class Source(Protocol):
    """Encoded images, addressed by sample id 0..N-1; ids are stable between processes and runs."""

    @property
    def num_samples(self) -> int:
        """N."""
        ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """[N], `UNLABELLED` where an image has none; None: no labels at all."""
        ...

    @property
    def block_starts(self) -> NDArray[np.int64] | None:
        """First sample id of every group of rows that is read together; None: random access is cheap."""
        ...

    def fingerprint(self) -> str:
        """Return a digest that changes when names, sizes or order of the images change."""
        ...

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the encoded images of these ids; no bytes where there is none, or one of more than data.max_image_mib.

        Raises:
            OSError: the storage failed; the caller retries.
        """
        ...

    def describe(self, sample_id: int) -> str:
        """Return where an image lies, for messages: a path, or file and row."""
        ...


def open_source(source: str, config: DataConfig) -> Source:
    """Open `digits`, a folder of images in class folders, or Parquet in the Hugging Face image layout.

    Raises:
        DataError: there is nothing usable at `source`; the message says what was found and what is expected.
    """
    from hvp_ray.data.folder import FolderSource
    from hvp_ray.data.parquet import ParquetSource, find_parquet_files

    if source == "digits":
        from hvp_ray.data.digits import DigitsSource  # takes scikit-learn with it: seconds

        return DigitsSource()
    if source.startswith(REMOTE_SCHEMES):
        raise DataError(
            f"data.source={source!r}: remote sources are not supported yet; copy the files to a local folder"
        )
    path = Path(source).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise DataError(f"data.source={source!r} cannot be read: {error.strerror}") from error
    if not exists:
        raise DataError(f"data.source={source!r} does not exist; expected `digits`, a folder or a Parquet file")
    if not path.is_file() and not path.is_dir():
        raise DataError(f"data.source={source!r} is a pipe, a device or a socket; expected a folder or a Parquet file")
    parquet_files = find_parquet_files(path)
    if parquet_files:
        return ParquetSource(
            parquet_files,
            image_column=config.image_column,
            label_column=config.label_column,
            cache_bytes=config.block_cache_mib * 2**20,
            max_row_group_bytes=config.max_row_group_mib * 2**20,
            max_image_bytes=config.max_image_mib * 2**20,
        )
    if path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise DataError(
            f"data.source={source!r} is an archive, and archives are not read; unpack it into a folder of images, or give "
            f"Parquet"
        )
    if path.is_file():
        raise DataError(f"data.source={source!r} is a file, but not Parquet; expected *.parquet or a folder of images")
    return FolderSource(path, max_image_bytes=config.max_image_mib * 2**20)
