"""Footers of Parquet files, read in a child process, and columns of row groups, read within limited memory.

A footer may be wrong, and a few kilobytes can decode to many gigabytes. pyarrow 25 ends the process at a damaged column
(`RowGroupMetaData.column`). So `read_summaries` parses and checks footers in a child process, which may crash. `ParquetFile`
then reads columns in the process that needs them. A column larger than its footer says exceeds the limit of memory, and
the error names its file. Bytes are fetched before Arrow parses them, so a storage failure is never mistaken for damage.
"""

import io
import itertools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hvp_ray.data.columns import Column, ColumnNames, bytes_path, find_images, find_labels, find_paths
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.limited_process import CrashError, LimitedProcess, limited_memory
from hvp_ray.errors import DataError, first_line
from hvp_ray.files import OpenFile, retried

REQUESTS_AT_ONCE = 16
_FOOTERS_AT_ONCE = 128
"""Footers at a URI that are in memory at a time."""

_MAX_FOOTER_BYTES = 64 * 2**20
_FIRST_TAIL_BYTES = 65_536
"""Most footers are smaller than this, so one request fetches them."""
_FOOTER_MEMORY_BYTES = 2**30
_ARROW_MEMORY_BYTES = 2**30
"""Arrow's allocator reserves this at its first allocation."""
_MAX_THRIFT_ENTRIES = 500_000
_NEVER_REPEAT = frozenset({"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"})
"""Encodings whose values decode to no more bytes than the column has. (RLE encodes levels and booleans.)"""
_MAX_ROWS_AT_ONCE = 65_536
_ARROW_ERRORS = (pa.ArrowException, OSError, OverflowError, MemoryError, IndexError, ValueError)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FileSummary:
    """Checked contents of one file's footer."""

    group_rows: NDArray[np.int64]
    """[groups]"""
    group_bytes: NDArray[np.int64]
    """[groups], all columns, decompressed."""
    images: "ColumnSummary"
    labels: "ColumnSummary"
    paths: "ColumnSummary"
    """Of an image list, in place of `images`."""
    may_hold_images: bool
    """Whether a column of images was found, or several that may be."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ColumnSummary:
    """Place of one column in the row groups of a file."""

    path: str
    """Of the values, such as `image.bytes`."""
    chunks: NDArray[np.int64]
    """[groups, 4], see `_describe_chunks`."""
    problem: str
    """Why there is no such column, as a sentence. Empty: there is one."""


def read_summaries(
    files: FileSet, names: Sequence[str], columns: ColumnNames
) -> Generator[FileSummary | DataError, None, None]:
    """Yield a summary of each footer, or an error: the file is damaged, no Parquet, or made to take much memory.

    Raises:
        StorageError: a footer cannot be read.
    """

    def fetch(name: str) -> bytes | DataError:
        try:
            if files.is_remote:
                return retried(lambda: _fetch_footer(files.open(name)), f"reading {files.shown(name)}")
            return _fetch_footer(files.open(name))
        except DataError as error:
            return error

    at_once = _FOOTERS_AT_ONCE if files.is_remote else 1
    with (
        ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool,
        LimitedProcess(f"{__name__}:summarise", memory_bytes=_FOOTER_MEMORY_BYTES) as process,
    ):
        parts = (names[start : start + at_once] for start in range(0, len(names), at_once))
        footers = itertools.chain.from_iterable((pool.map if files.is_remote else map)(fetch, part) for part in parts)
        for name, footer in zip(names, footers, strict=True):
            shown = files.shown(name)
            if isinstance(footer, DataError):
                yield footer
                continue
            try:
                yield process.call(footer, files.sizes[name], shown, columns)
            except DataError as error:
                yield error
            except CrashError as error:
                yield DataError(f"{_refusal(shown)}: its footer crashes the process that reads it ({error})")


def summarise(footer: bytes, file_bytes: int, shown: str, columns: ColumnNames) -> FileSummary:
    """Parse and check a footer. Called in a child process, which a damaged column ends.

    Args:
        footer: the end of the file, from its footer on.
        file_bytes: size of the file.
        shown: path or URI, for messages.
        columns: that will be read.

    Raises:
        DataError: the footer is damaged, or contradicts itself.
    """
    try:
        file = _parse(footer)
        schema, metadata = file.schema_arrow, file.metadata
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        leaves = [file.schema.column(index).path for index in range(len(file.schema))]
    except _ARROW_ERRORS as error:
        raise DataError(f"{_refusal(shown)}: {first_line(error)}") from error
    rows = np.array([group.num_rows for group in groups], np.int64)
    if rows.min(initial=0) < 0 or sum(rows.tolist()) != metadata.num_rows:
        raise DataError(f"{_refusal(shown)}: the footer has {metadata.num_rows} rows, its row groups {rows.sum()}")
    for index, group in enumerate(groups):
        if group.num_columns != len(leaves):
            raise DataError(f"{_refusal(shown)}: row group {index} has {group.num_columns} of {len(leaves)} columns")

    def chunks_of(path: str) -> NDArray[np.int64]:
        if leaves.count(path) != 1:
            raise DataError(f"{shown} has {leaves.count(path)} columns {path!r}; expected one")
        return _describe_chunks(groups, leaves.index(path), file_bytes, f"{shown}: column {path!r}")

    def summary_of(column: Column, path: str) -> ColumnSummary:
        if column.problem:
            return ColumnSummary(path="", chunks=np.zeros((0, 4), np.int64), problem=f"{shown}{column.problem}")
        return ColumnSummary(path=path, chunks=chunks_of(path), problem="")

    images = find_images(schema, columns.image)
    paths = (
        find_paths(schema, columns.image) if images.problem else Column(problem=" has images, so it is no list of them")
    )
    labels = find_labels(schema, columns.label)
    return FileSummary(
        group_rows=rows,
        group_bytes=np.array([group.total_byte_size for group in groups], np.int64),
        images=summary_of(images, "" if images.problem else bytes_path(schema, images.path)),
        labels=summary_of(labels, labels.path),
        paths=summary_of(paths, paths.path),
        may_hold_images=any(not c.problem or c.is_ambiguous for c in (images, find_images(schema, None))),
    )


def _describe_chunks(
    groups: Sequence[pq.RowGroupMetaData], leaf: int, file_bytes: int, shown: str
) -> NDArray[np.int64]:
    """Return [groups, 4] of a column without lists: first byte, byte after the last, bytes decompressed, may it repeat.

    It may repeat (1) if an encoding can store a value, or a part of it, once and use it in many rows.
    """
    chunks = np.zeros((len(groups), 4), np.int64)
    for index, group in enumerate(groups):
        chunk = group.column(leaf)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
            start = chunk.dictionary_page_offset
        end, num_bytes = start + chunk.total_compressed_size, chunk.total_uncompressed_size
        if chunk.num_values != group.num_rows:
            raise DataError(
                f"{shown} is damaged: row group {index} has {group.num_rows} rows, but {chunk.num_values} values"
            )
        if not 0 <= start <= end <= file_bytes or num_bytes < 0:
            raise DataError(
                f"{shown} is damaged: row group {index} has bytes {start} to {end} of {file_bytes}, {num_bytes} decompressed"
            )
        chunks[index] = start, end, num_bytes, not _NEVER_REPEAT.issuperset(chunk.encodings)
    return chunks


class ParquetFile:
    """A file whose footer was checked by `summarise`, opened to read columns."""

    def __init__(self, opened: OpenFile) -> None:
        """Read the footer.

        Raises:
            DataError: it is damaged.
            StorageError: it cannot be read.
        """
        self.path = opened.shown
        """Path or URI, for messages."""
        self._opened = opened
        self._window = _Window(opened.size)
        footer = _fetch_footer(opened)
        try:
            with limited_memory(_FOOTER_MEMORY_BYTES + _ARROW_MEMORY_BYTES):
                metadata = _parse(footer).metadata
                # Without buffers of its own, Arrow reads in this thread. Its threads must not hold Python objects: one that
                # releases its last while the interpreter ends aborts the process (apache/arrow#34314).
                source = pa.PythonFile(self._window, mode="r")
                self._arrow = pq.ParquetFile(source, metadata=metadata, pre_buffer=False)
                self.schema = self._arrow.schema_arrow
        except _ARROW_ERRORS as error:
            raise DataError(f"{_refusal(self.path)}: {first_line(error)}") from error

    def has_group(self, group: int, num_rows: int) -> bool:
        """Tell whether a row group has `num_rows` rows, as when the source was opened."""
        metadata = self._arrow.metadata
        return bool(group < metadata.num_row_groups and metadata.row_group(group).num_rows == num_rows)

    def read_column(
        self, path: str, group: int, chunk: NDArray[np.int64], *, max_bytes: int, convert: Callable[[pa.Array], T]
    ) -> list[T]:
        """Read one column of a row group in parts; return what `convert` makes of each.

        If the footer is correct, a part has at most `max_bytes`. Otherwise reading stops at 2 x `max_bytes` + 1 GiB.

        Args:
            path: path of the column, such as `image.bytes`. Its values are returned without the structs around them.
            group: index of the row group.
            chunk: [4], see `ColumnSummary`.
            max_bytes: data.max_row_group_mib.
            convert: called with each part. What it raises is passed on.

        Raises:
            DataError: the column is damaged, or takes more memory.
            StorageError: its bytes cannot be read.
        """
        start, end, num_bytes, may_repeat = chunk.tolist()
        if end - start > max_bytes:
            raise DataError(too_large(self.path, group, path, end - start, max_bytes))
        rows = max(1, min(_MAX_ROWS_AT_ONCE, max_bytes // max(1, num_bytes))) if may_repeat else _MAX_ROWS_AT_ONCE
        self._window.hold(start, self._opened.read_at(start, end - start))
        try:
            with limited_memory(2 * max_bytes + _ARROW_MEMORY_BYTES):
                batches = self._arrow.iter_batches(rows, row_groups=[group], columns=[path], use_threads=False)
                return [convert(_innermost(batch.column(0))) for batch in batches]
        except MemoryError as error:
            raise DataError(too_large(self.path, group, path, 2 * max_bytes, max_bytes)) from error
        except _ARROW_ERRORS as error:
            raise DataError(f"{self.path}: row group {group} is damaged: {first_line(error)}") from error
        finally:
            self._window.hold(0, b"")


def too_large(shown: str, group: int, column: str, num_bytes: int, max_bytes: int) -> str:
    """Return the sentence about a row group that takes more memory than a setting allows."""
    return (
        f"{shown}: row group {group} has {num_bytes / 2**20:.0f} MiB or more of column {column!r}, but "
        f"data.max_row_group_mib={max_bytes // 2**20}; write the file with smaller row groups, or raise the limit if all "
        f"workers have the memory"
    )


def _innermost(values: pa.Array) -> pa.Array:
    """Return the values of the only column that was read of a struct."""
    while pa.types.is_struct(values.type):
        values = values.field(0)
    return values


def _refusal(shown: str) -> str:
    return f"{shown} cannot be read as Parquet"


def _parse(footer: bytes) -> pq.ParquetFile:
    return pq.ParquetFile(
        pa.BufferReader(b"PAR1" + footer),
        thrift_container_size_limit=_MAX_THRIFT_ENTRIES,
        thrift_string_size_limit=_MAX_FOOTER_BYTES,
    )


def _fetch_footer(file: OpenFile) -> bytes:
    """Return the end of a file from its footer on.

    Raises:
        DataError: the file is no Parquet, or its footer is too large.
        StorageError: it cannot be read.
    """
    tail = file.read_at(max(0, file.size - _FIRST_TAIL_BYTES), min(file.size, _FIRST_TAIL_BYTES))
    footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < 12 or tail[-4:] != b"PAR1" or footer_bytes > file.size:
        raise DataError(f"{_refusal(file.shown)}: it does not end as Parquet files do; write it again")
    if footer_bytes > _MAX_FOOTER_BYTES:
        raise DataError(
            f"{file.shown} has a footer of {footer_bytes // 2**20} MiB, more than {_MAX_FOOTER_BYTES // 2**20}; rewrite it "
            f"as several files, or with larger row groups"
        )
    return tail[-footer_bytes:] if footer_bytes <= len(tail) else file.read_at(file.size - footer_bytes, footer_bytes)


class _Window(io.RawIOBase):
    """A file of which Arrow sees only the bytes in memory: one column of one row group."""

    def __init__(self, file_bytes: int) -> None:
        self._file_bytes = file_bytes
        self._position = 0
        self.hold(0, b"")

    def hold(self, start: int, content: bytes) -> None:
        """Keep only these bytes of the file."""
        self._start, self._content = start, content

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position; see `io`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file_bytes}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, as far as they are in memory."""
        begin = self._position - self._start
        end = len(self._content) if size is None or size < 0 else begin + size
        content = self._content[begin:end] if begin >= 0 else b""
        self._position += len(content)
        return content
