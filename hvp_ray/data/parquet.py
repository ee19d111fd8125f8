"""Parquet in the Hugging Face image layout: a column `image: struct<bytes, path>` and a column of integer labels.

Rows are read by row group, and decompressed row groups are kept in a bounded cache; `data.order` visits samples so
that neighbouring steps read few row groups. What a row group will take is known before it is read (`parquet_limits.py`).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvp_ray.data.parquet_limits import ParquetFile, open_parquet
from hvp_ray.data.source import UNLABELLED
from hvp_ray.errors import DataError

MAX_LABEL = 2**20 - 1
"""Evaluation keeps votes for every class up to the largest."""

_ROWS_WITHOUT_QUESTION = 2**20
_BYTES_PER_ROW = 16
"""Of more rows than `_ROWS_WITHOUT_QUESTION`, each must take so many bytes of the files; no image is smaller."""

_LABELS_AT_ONCE = 65_536
_BATCH_BYTES = 64 * 2**20


def find_parquet_files(path: Path) -> list[Path]:
    """Return the Parquet files at `path`, sorted: the file itself, or all below a folder; empty: there are none."""
    if path.is_file():
        return [path] if path.suffix.lower() in (".parquet", ".pq") else []
    return sorted(p for p in path.rglob("*.parquet") if p.is_file() and not p.name.startswith("."))


class ParquetSource:
    """Images in local Parquet files; ids count the rows of the sorted files. Implements `Source`."""

    def __init__(
        self,
        paths: list[Path],
        *,
        image_column: str,
        label_column: str,
        cache_bytes: int,
        max_row_group_bytes: int,
        max_image_bytes: int,
    ) -> None:
        """Open the files and read their labels.

        Args:
            paths: the files, sorted.
            image_column: see `DataConfig`.
            label_column: see `DataConfig`.
            cache_bytes: memory for decompressed row groups.
            max_row_group_bytes: a row group with more bytes of images is refused.
            max_image_bytes: larger images are returned as no bytes.

        Raises:
            DataError: a file is no Parquet, is damaged, has other columns, or is made to take too much memory.
        """
        self._files = [open_parquet(path) for path in paths]
        self._paths = paths
        self._image_column = image_column
        self._max_row_group_bytes = max_row_group_bytes
        self._max_image_bytes = max_image_bytes
        self._leaves = [_image_leaf(file, image_column) for file in self._files]
        groups = [
            (file_index, group)
            for file_index, file in enumerate(self._files)
            for group in range(len(file.groups))
            if file.groups[group].num_rows
        ]
        if not groups:
            raise DataError(f"{paths[0]} has no rows" if len(paths) == 1 else f"none of {len(paths)} files has rows")
        sizes = [self._files[file_index].groups[group].num_rows for file_index, group in groups]
        self._groups = groups
        self._check_rows(sum(sizes))
        for file, leaf in zip(self._files, self._leaves, strict=True):
            file.check_column(leaf)
        for file_index, group in groups:
            chunk = self._files[file_index].groups[group].chunks[self._leaves[file_index]]
            self._check_group_bytes(file_index, group, chunk.decompressed_bytes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._labels = self._read_labels(label_column)
        self._cache: OrderedDict[int, _Block] = OrderedDict()
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
        for file in self._files:
            digest.update(f"{file.path.name}\0{file.path.stat().st_size}\0{file.num_rows}\n".encode())
            for group in file.groups:
                digest.update(f"{group.num_rows} {group.total_bytes}\n".encode())
        return digest.hexdigest()

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the images' bytes; null, or larger than allowed: no bytes, which counts as unreadable."""
        block_indices = (np.searchsorted(self._starts, np.asarray(sample_ids), side="right") - 1).tolist()
        images: list[bytes] = [b""] * len(sample_ids)
        # Block by block, so that a batch never reads a row group twice, however small the cache is.
        for position in sorted(range(len(sample_ids)), key=lambda i: block_indices[i]):
            block = self._block(block_indices[position])
            row = sample_ids[position] - int(self._starts[block_indices[position]])
            images[position] = block.image(row, self._max_image_bytes)
        return images

    def describe(self, sample_id: int) -> str:
        """Name file and row."""
        block_index = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        file_index, _ = self._groups[block_index]
        first_block = next(i for i, (f, _) in enumerate(self._groups) if f == file_index)
        return f"{self._paths[file_index]} row {sample_id - int(self._starts[first_block])}"

    def _block(self, block_index: int) -> "_Block":
        if block_index in self._cache:
            self._cache.move_to_end(block_index)
            return self._cache[block_index]
        block = self._read_group(*self._groups[block_index])
        self.num_bytes_read += block.num_bytes
        self._cache[block_index] = block
        self._cached_bytes += block.num_bytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.num_bytes
        return block

    def _read_group(self, file_index: int, group: int) -> "_Block":
        """Read the images of a row group: at once where it is known to fit, else in parts that are added up."""
        file, leaf, limit = self._files[file_index], self._leaves[file_index], self._max_row_group_bytes
        cost = file.measure(group, leaf)
        self._check_group_bytes(file_index, group, cost.page_bytes)
        columns = [file.leaf_path(leaf)]
        try:
            if cost.decoded_bytes <= limit:
                return _Block([_images(file.arrow.read_row_group(group, columns=columns).column(0).combine_chunks())])
            parts: list[pa.Array] = []
            num_bytes = 0
            num_rows = max(1, min(limit, _BATCH_BYTES) // cost.largest_page_bytes)
            for batch in file.arrow.iter_batches(batch_size=num_rows, row_groups=[group], columns=columns):
                parts.append(_images(batch.column(0)))
                num_bytes += parts[-1].nbytes
                self._check_group_bytes(file_index, group, num_bytes)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.path}: row group {group} is damaged: {error}") from error
        return _Block(parts)

    def _check_group_bytes(self, file_index: int, group: int, num_bytes: int) -> None:
        if not 0 <= num_bytes <= self._max_row_group_bytes:
            raise DataError(
                f"{self._paths[file_index]}: row group {group} has {num_bytes / 2**20:.0f} MiB of images or more, and "
                f"data.max_row_group_mib={self._max_row_group_bytes // 2**20}; write the file with smaller row groups, or "
                f"raise the limit where all workers have the memory"
            )

    def _check_rows(self, num_rows: int) -> None:
        num_bytes = sum(path.stat().st_size for path in self._paths)
        if num_rows > max(_ROWS_WITHOUT_QUESTION, num_bytes // _BYTES_PER_ROW):
            raise DataError(
                f"{self._paths[0]}{' and others' if len(self._paths) > 1 else ''}: {num_rows} rows in {num_bytes} bytes "
                f"cannot be images (at least {_BYTES_PER_ROW} bytes each)"
            )

    def _read_labels(self, label_column: str) -> NDArray[np.int64] | None:
        if any(label_column not in file.arrow.schema_arrow.names for file in self._files):
            return None
        labels = np.empty(self.num_samples, np.int64)
        start = 0
        for file in self._files:
            for part in self._label_parts(file, label_column):
                labels[start : start + len(part)] = part
                start += len(part)
        if start != len(labels):
            raise DataError(f"{self._paths[0]}: {start} labels for {len(labels)} images; the file is damaged")
        if labels.min() < UNLABELLED or labels.max() > MAX_LABEL:
            raise DataError(
                f"column {label_column!r} has values from {labels.min()} to {labels.max()}; expected classes from 0 to "
                f"{MAX_LABEL}, or {UNLABELLED} for none. Name another column by --data.label_column, or one that is not there"
            )
        return labels

    def _label_parts(self, file: ParquetFile, label_column: str) -> Iterator[NDArray[np.int64]]:
        kind = file.arrow.schema_arrow.field(label_column).type
        if not pa.types.is_integer(kind):
            raise DataError(f"{file.path}: column {label_column!r} has type {kind}; expected integers")
        leaf = file.find_leaf(label_column)
        file.check_column(leaf)
        for group in range(len(file.groups)):
            page_bytes = file.measure(group, leaf).page_bytes
            if page_bytes > self._max_row_group_bytes:
                raise DataError(f"{file.path}: the labels of row group {group} take {page_bytes / 2**20:.0f} MiB")
        try:
            for batch in file.arrow.iter_batches(batch_size=_LABELS_AT_ONCE, columns=[label_column]):
                whole = batch.column(0).cast(pa.int64()).fill_null(UNLABELLED)
                yield whole.to_numpy(zero_copy_only=False)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.path}: column {label_column!r} is damaged: {error}") from error


class _Block:
    """The images of one row group, in the parts that they were read in."""

    def __init__(self, parts: list[pa.Array]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.num_bytes = sum(part.nbytes for part in parts)

    def image(self, row: int, max_bytes: int) -> bytes:
        """Return a row's bytes; none: it is null, or larger than `max_bytes`."""
        if len(self._parts) == 1:
            value = self._parts[0][row].as_buffer()
        else:
            part = int(np.searchsorted(self._ends, row, side="right"))
            value = self._parts[part][row - (int(self._ends[part - 1]) if part else 0)].as_buffer()
        return b"" if value is None or value.size > max_bytes else value.to_pybytes()


def _images(column: pa.Array) -> pa.Array:
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _image_leaf(file: ParquetFile, image_column: str) -> int:
    """Return the place of the column of bytes among the leaves of the schema."""
    path, schema = file.path, file.arrow.schema_arrow
    if image_column not in schema.names:
        shown = f"{schema.names[:20]}{' and more' if len(schema.names) > 20 else ''}"
        raise DataError(
            f"{path} has no column {image_column!r}; it has {shown}. Name the column with images by --data.image_column"
        )
    if schema.names.count(image_column) > 1:
        raise DataError(f"{path} has {schema.names.count(image_column)} columns {image_column!r}; expected one")
    kind = schema.field(image_column).type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    leaf = image_column
    if pa.types.is_struct(kind) and [field.name for field in kind].count("bytes") == 1:
        inner = kind.field("bytes").type
        binary = pa.types.is_binary(inner) or pa.types.is_large_binary(inner)
        leaf = f"{image_column}.bytes"
    if not binary:
        raise DataError(
            f"{path}: column {image_column!r} has type {str(kind)[:200]}; expected struct<bytes: binary, path: string> "
            f"or binary"
        )
    return file.find_leaf(leaf)
