"""Parquet in the Hugging Face image layout: a column `image: struct<bytes, path>` and a column of integer labels.

Rows are read by row group, and decompressed row groups are kept in a bounded cache; `data.order` visits samples so
that neighbouring steps read few row groups.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvp_ray.data.source import UNLABELLED
from hvp_ray.errors import DataError


def find_parquet_files(path: Path) -> list[Path]:
    """Return the Parquet files at `path`, sorted: the file itself, or all below a folder; empty: there are none."""
    if path.is_file():
        return [path] if path.suffix.lower() in (".parquet", ".pq") else []
    return sorted(p for p in path.rglob("*.parquet") if p.is_file() and not p.name.startswith("."))


class ParquetSource:
    """Images in local Parquet files; ids count the rows of the sorted files. Implements `Source`."""

    def __init__(self, paths: list[Path], *, image_column: str, label_column: str, cache_bytes: int) -> None:
        self._files = [_open(path) for path in paths]
        self._paths = paths
        self._image_column = image_column
        for path, file in zip(paths, self._files, strict=True):
            _check_columns(path, file.schema_arrow, image_column)
        groups = [
            (file_index, group)
            for file_index, file in enumerate(self._files)
            for group in range(file.metadata.num_row_groups)
            if file.metadata.row_group(group).num_rows
        ]
        if not groups:
            raise DataError(f"{paths[0]} has no rows" if len(paths) == 1 else f"none of {len(paths)} files has rows")
        sizes = [self._files[file_index].metadata.row_group(group).num_rows for file_index, group in groups]
        self._groups = groups
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._labels = self._read_labels(label_column)
        self._cache: OrderedDict[int, pa.Array] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self.num_bytes_read = 0
        """Bytes of decompressed row groups read so far."""

    @property
    def num_samples(self) -> int:
        """Rows of all files."""
        return int(self._starts[-1])

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The label column; None where a file has none."""
        return self._labels

    @property
    def block_starts(self) -> NDArray[np.int64] | None:
        """Row groups."""
        return self._starts[:-1]

    def fingerprint(self) -> str:
        """Digest of file names, row counts and the footers' sizes and offsets."""
        digest = hashlib.sha256()
        for path, file in zip(self._paths, self._files, strict=True):
            digest.update(f"{path.name}\0{path.stat().st_size}\0{file.metadata.num_rows}\n".encode())
            for group in range(file.metadata.num_row_groups):
                row_group = file.metadata.row_group(group)
                digest.update(f"{row_group.num_rows} {row_group.total_byte_size}\n".encode())
        return digest.hexdigest()

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the images' bytes; a null image is returned as no bytes, which counts as unreadable."""
        block_indices = (np.searchsorted(self._starts, np.asarray(sample_ids), side="right") - 1).tolist()
        images: list[bytes] = [b""] * len(sample_ids)
        # Block by block, so that a batch never reads a row group twice, however small the cache is.
        for position in sorted(range(len(sample_ids)), key=lambda i: block_indices[i]):
            block = self._block(block_indices[position])
            row = sample_ids[position] - int(self._starts[block_indices[position]])
            images[position] = block[row].as_py() or b""
        return images

    def describe(self, sample_id: int) -> str:
        """Name file and row."""
        block_index = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        file_index, _ = self._groups[block_index]
        first_block = next(i for i, (f, _) in enumerate(self._groups) if f == file_index)
        return f"{self._paths[file_index]} row {sample_id - int(self._starts[first_block])}"

    def _block(self, block_index: int) -> pa.Array:
        if block_index in self._cache:
            self._cache.move_to_end(block_index)
            return self._cache[block_index]
        file_index, group = self._groups[block_index]
        try:
            table = self._files[file_index].read_row_group(group, columns=[self._image_column])
        except pa.ArrowInvalid as error:
            raise DataError(f"{self._paths[file_index]}: row group {group} is damaged: {error}") from error
        images = table.column(0).combine_chunks()
        if pa.types.is_struct(images.type):
            images = images.field("bytes")
        self.num_bytes_read += images.nbytes
        self._cache[block_index] = images
        self._cached_bytes += images.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.nbytes
        return images

    def _read_labels(self, label_column: str) -> NDArray[np.int64] | None:
        columns = []
        for path, file in zip(self._paths, self._files, strict=True):
            if label_column not in file.schema_arrow.names:
                return None
            kind = file.schema_arrow.field(label_column).type
            if not pa.types.is_integer(kind):
                raise DataError(f"{path}: column {label_column!r} has type {kind}; expected integers")
            labels = file.read(columns=[label_column]).column(0).fill_null(UNLABELLED)
            columns.append(labels.to_numpy().astype(np.int64))
        return np.concatenate(columns)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _check_columns(path: Path, schema: pa.Schema, image_column: str) -> None:
    if image_column not in schema.names:
        raise DataError(
            f"{path} has no column {image_column!r}; it has {schema.names}. Name the column with images by "
            f"--data.image_column"
        )
    kind = schema.field(image_column).type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
        inner = kind.field("bytes").type
        binary = pa.types.is_binary(inner) or pa.types.is_large_binary(inner)
    if not binary:
        raise DataError(
            f"{path}: column {image_column!r} has type {kind}; expected struct<bytes: binary, path: string> or binary"
        )
