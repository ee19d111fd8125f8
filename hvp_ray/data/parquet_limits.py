"""What a Parquet file may cost: found in its footer and page headers, before a byte is decompressed.

A few kilobytes can hold row groups of many gigabytes, and a footer can lie about it. Arrow believes the footer and the page
headers, and allocates what they say. Here both are read and compared, so that what Arrow is asked to do is bounded. They are
read by this file alone: Arrow's own view of a damaged column (`RowGroupMetaData.column`) ends the process (pyarrow 25).
The bytes of a column are fetched once, from wherever the file lies; pages are measured in them, and Arrow decodes them from
memory. Used by `parquet.py` and by those that read a run's own Parquet files.

Source: the format's parquet.thrift; Thrift's compact protocol.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hvp_ray.data.files import FileSet, OpenFile, StorageError
from hvp_ray.errors import DataError, first_line

MAX_FOOTER_BYTES = 64 * 2**20
_MAX_FOOTER_ENTRIES = 500_000
_FIRST_TAIL_BYTES = 65_536
"""So much of the end of a file is fetched at once; most footers are smaller."""
_MAX_PAGE_HEADER_BYTES = 2**20
_MAX_DEPTH = 32
_PAGES_WITHOUT_VALUES = 16
_NUMBERS = frozenset({"BOOLEAN", "INT32", "INT64", "FLOAT", "DOUBLE"})

_INT32, _INT64, _LIST, _STRUCT = 5, 6, 9, 12
"""Types of Thrift's compact protocol."""

_PLAIN_ENCODINGS = frozenset({0, 6})
"""PLAIN and DELTA_LENGTH_BYTE_ARRAY: what is decoded is not larger than the page. (RLE is for levels and booleans.)"""
_DICTIONARY_ENTRY_BYTES = 16
"""Pointer and length of a value, as Arrow keeps them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnCost:
    """What decoding one column of one row group can take, from its page headers."""

    page_bytes: int
    """All pages together, decompressed, and Arrow's index of the dictionary."""
    largest_page_bytes: int
    """No value is larger than this."""
    num_repeatable: int
    """Values in pages whose encoding can repeat a value, or a part of it, at the price of a few bits."""

    @property
    def decoded_bytes(self) -> int:
        """At most so many bytes of values come out."""
        return self.page_bytes + self.num_repeatable * self.largest_page_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnChunk:
    """What the footer says about one column of one row group."""

    num_values: int
    decompressed_bytes: int
    start: int
    """First byte in the file."""
    end: int
    """Behind the last byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """What the footer says about one row group."""

    num_rows: int
    total_bytes: int
    chunks: tuple[ColumnChunk, ...]
    """By leaves of the schema."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ParquetFile:
    """An open file, whose footer has been read twice: by Arrow and by us."""

    path: str
    """Path or URI, for messages."""
    arrow: pq.ParquetFile
    groups: tuple[RowGroup, ...]
    window: "_Window"

    @property
    def num_rows(self) -> int:
        """Rows of all row groups."""
        return sum(group.num_rows for group in self.groups)

    def leaf_path(self, leaf: int) -> str:
        """Return the name of a leaf of the schema, for instance `image.bytes`."""
        path: str = self.arrow.schema.column(leaf).path
        return path

    def find_leaf(self, path: str) -> int:
        """Return the place of a column among the leaves of the schema.

        Raises:
            DataError: there is none of this path, or several.
        """
        found = [leaf for leaf in range(len(self.arrow.schema)) if self.leaf_path(leaf) == path]
        if len(found) != 1:
            raise DataError(f"{self.path} has {len(found)} columns {path!r}; expected one")
        return found[0]

    def check_column(self, leaf: int) -> None:
        """Check what the footer says about a column without lists: as many values as rows, and bytes inside of the file.

        Raises:
            DataError: it cannot be true.
        """
        for index, group in enumerate(self.groups):
            if group.chunks[leaf].num_values != group.num_rows:
                raise DataError(
                    f"{self.path}: row group {index} has {group.num_rows} rows, but {group.chunks[leaf].num_values} values "
                    f"of {self.leaf_path(leaf)!r}; the file is damaged"
                )

    def fetch(self, group: int, leaf: int) -> None:
        """Bring the bytes of one column of one row group into memory, where they are measured and decoded.

        Raises:
            StorageError: they cannot be read.
        """
        chunk = self.groups[group].chunks[leaf]
        self.window.hold(chunk.start, chunk.end)

    def release(self) -> None:
        """Give the memory back that `fetch` took."""
        self.window.hold(0, 0)

    def measure(self, group: int, leaf: int) -> ColumnCost:
        """Add up the pages of one column of one row group, by their headers.

        Raises:
            DataError: the pages are damaged, or are not what the footer says.
            StorageError: they cannot be read (where they were not fetched).
        """
        chunk = self.groups[group].chunks[leaf]
        page_bytes = largest = num_repeatable = num_values = 0
        try:
            for page in _pages(self.window, chunk):
                page_bytes += page.decompressed_bytes + _DICTIONARY_ENTRY_BYTES * page.num_dictionary_values
                largest = max(largest, page.decompressed_bytes)
                num_values += page.num_values
                num_repeatable += 0 if page.encoding in _PLAIN_ENCODINGS else page.num_values
        except (IndexError, ValueError) as error:
            raise DataError(f"{self.path}: row group {group} is damaged: {first_line(error)}") from error
        if num_values != chunk.num_values:
            raise DataError(
                f"{self.path}: row group {group} is damaged: {chunk.num_values} values of {self.leaf_path(leaf)!r} by the "
                f"footer, {num_values} by the pages"
            )
        return ColumnCost(page_bytes=page_bytes, largest_page_bytes=largest, num_repeatable=num_repeatable)


def open_parquet(opened: OpenFile) -> ParquetFile:
    """Open a file whose footer can be true.

    Raises:
        DataError: no Parquet, a damaged footer, or one that is made to cost much.
        StorageError: it cannot be read.
    """
    path = opened.shown
    refusal = f"{path} cannot be read as Parquet"
    try:
        window = _Window(opened)
        footer = _fetch_footer(window, path)
        groups = _Thrift(footer).row_groups() if footer is not None else ()
        arrow = pq.ParquetFile(pa.PythonFile(window, mode="r"))
        num_leaves, num_rows = len(arrow.schema), arrow.metadata.num_rows
        _ = arrow.schema_arrow  # made from a text in the file, which may not be one
    except StorageError:
        raise
    except (pa.ArrowException, OSError, OverflowError, MemoryError, IndexError, ValueError) as error:
        raise DataError(f"{refusal}: {first_line(error)}") from error
    window.hold(0, 0)
    file = ParquetFile(path=path, arrow=arrow, groups=groups, window=window)
    if min((group.num_rows for group in groups), default=0) < 0 or file.num_rows != num_rows:
        raise DataError(f"{refusal}: the footer says {num_rows} rows, its row groups have {file.num_rows}")
    for index, group in enumerate(groups):
        if len(group.chunks) != num_leaves:
            raise DataError(f"{refusal}: row group {index} has {len(group.chunks)} of {num_leaves} columns")
        for chunk in group.chunks:
            if not 0 <= chunk.start <= chunk.end <= opened.size or min(chunk.num_values, chunk.decompressed_bytes) < 0:
                raise DataError(
                    f"{refusal}: row group {index} is damaged: bytes {chunk.start} to {chunk.end} of {opened.size}, "
                    f"{chunk.num_values} values, {chunk.decompressed_bytes} bytes decompressed"
                )
    return file


def read_small_table(path: Path, *, max_bytes: int) -> pa.Table:
    """Read a whole file of numbers and lists of numbers, if it decodes to no more than `max_bytes`.

    Raises:
        DataError: no Parquet, damaged, or larger.
    """
    files = FileSet(str(path), option="the file")
    try:
        file = open_parquet(files.open(path.name))
        return _read_small(file, max_bytes)
    except StorageError as error:
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def _read_small(file: ParquetFile, max_bytes: int) -> pa.Table:
    total = 0
    for index, group in enumerate(file.groups):
        for leaf, chunk in enumerate(group.chunks):
            cost = file.measure(index, leaf)
            is_number = file.arrow.schema.column(leaf).physical_type in _NUMBERS
            total += (cost.page_bytes if is_number else cost.decoded_bytes) + 8 * max(chunk.num_values, group.num_rows)
            if total > max_bytes:
                raise DataError(f"{file.path} decodes to more than {max_bytes // 2**20} MiB; expected a small file")
    try:
        return file.arrow.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path} is damaged: {first_line(error)}") from error


class _Window(io.RawIOBase):
    """A file as Arrow and we read it. One range of it may be held in memory; the rest comes from the storage."""

    def __init__(self, file: OpenFile) -> None:
        self.size = file.size
        self._file = file
        self._position = 0
        self._start = 0
        self._held = b""

    def hold(self, start: int, end: int) -> None:
        """Fetch a range, and let the last one go."""
        self._held = b""
        self._held = self._file.read_at(start, end - start) if end > start else b""
        self._start = start

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """Return at most so many bytes from `offset` on, fewer at the end of the file."""
        num_bytes = max(0, min(num_bytes, self.size - offset))
        start = offset - self._start
        if start >= 0 and start + num_bytes <= len(self._held):
            return self._held[start : start + num_bytes]
        return self._file.read_at(offset, num_bytes) if num_bytes else b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move; see `io`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes."""
        num_bytes = self.size - self._position if size is None or size < 0 else size
        content = self.read_at(self._position, num_bytes)
        self._position += len(content)
        return content


def _fetch_footer(window: _Window, path: str) -> bytes | None:
    """Return the footer, and hold it; None: there is none, and Arrow says what is wrong."""
    window.hold(max(0, window.size - _FIRST_TAIL_BYTES), window.size)
    tail = window.read_at(max(0, window.size - 8), 8)
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or footer_bytes > window.size - 8:
        return None
    if footer_bytes > MAX_FOOTER_BYTES:
        raise DataError(
            f"{path} has a footer of {footer_bytes // 2**20} MiB, more than {MAX_FOOTER_BYTES // 2**20}; rewrite it as "
            f"several files, or with larger row groups"
        )
    start = window.size - 8 - footer_bytes
    if footer_bytes + 8 > _FIRST_TAIL_BYTES:
        window.hold(start, window.size)
    return window.read_at(start, footer_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Page:
    decompressed_bytes: int
    compressed_bytes: int
    num_values: int
    encoding: int
    num_dictionary_values: int


def _pages(file: _Window, chunk: ColumnChunk) -> Iterator[_Page]:
    """Yield the headers of the pages that Arrow will read: those of as many values as the footer says."""
    position = chunk.start
    num_pages = num_values = 0
    while position < chunk.end and num_values < chunk.num_values:
        num_pages += 1
        if num_pages > chunk.num_values + _PAGES_WITHOUT_VALUES:
            raise ValueError("more pages than values")
        page, header_bytes = _read_page_header(file, position, chunk.end)
        if min(page.decompressed_bytes, page.compressed_bytes, page.num_values) < 0:
            raise ValueError("negative sizes in a page header")
        if not 0 <= page.num_dictionary_values <= page.decompressed_bytes:
            raise ValueError(f"{page.num_dictionary_values} dictionary values in {page.decompressed_bytes} bytes")
        yield page
        num_values += page.num_values
        position += header_bytes + page.compressed_bytes


def _read_page_header(file: _Window, position: int, end: int) -> tuple[_Page, int]:
    """Return the page header at `position`, and its length in bytes."""
    size = 512
    while True:
        data = file.read_at(position, min(size, end - position))
        thrift = _Thrift(data)
        try:
            return thrift.page_header(), thrift.position
        except IndexError:
            if len(data) < size or size >= _MAX_PAGE_HEADER_BYTES:
                raise ValueError(f"no page header at byte {position}") from None
            size *= 8


class _Thrift:
    """Reads what is needed of Thrift's compact protocol. A field of another type than expected is passed over, as Arrow does.

    Raises IndexError where the data end too early, and ValueError where they are none of this protocol.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0
        self._num_entries = 0

    def row_groups(self) -> tuple[RowGroup, ...]:
        """Read a footer (FileMetaData)."""
        groups: tuple[RowGroup, ...] = ()
        for number, kind in self._fields():
            if (number, kind) == (4, _LIST):
                groups = tuple(self._row_group(kind) for kind in self._elements())
            else:
                self._skip(kind)
        return groups

    def page_header(self) -> _Page:
        """Read a PageHeader."""
        sizes: dict[int, int] = {}
        by_version: dict[int, dict[int, int]] = {5: {}, 7: {}, 8: {}}
        for number, kind in self._fields():
            if number in by_version and kind == _STRUCT:
                self._take_numbers(by_version[number])
            elif number in (1, 2, 3) and kind == _INT32:
                sizes[number] = self._number()
            else:
                self._skip(kind)
        if not {1, 2, 3} <= sizes.keys():
            raise ValueError("a page header without sizes")
        # Type 0 is a data page, 3 one of the second version, 2 a dictionary; others have no values.
        page = by_version[5] if sizes[1] == 0 else by_version[8] if sizes[1] == 3 else {}
        return _Page(
            decompressed_bytes=sizes[2],
            compressed_bytes=sizes[3],
            num_values=page.get(1, 0),
            encoding=page.get(2 if sizes[1] == 0 else 4, -1),
            num_dictionary_values=by_version[7].get(1, 0) if sizes[1] == 2 else 0,
        )

    def _row_group(self, kind: int) -> RowGroup:
        numbers: dict[int, int] = {}
        chunks: tuple[ColumnChunk, ...] = ()
        for number, kind_of_field in self._fields_of(kind):
            if (number, kind_of_field) == (1, _LIST):
                chunks = tuple(self._chunk(kind) for kind in self._elements())
            elif number in (2, 3) and kind_of_field == _INT64:
                numbers[number] = self._number()
            else:
                self._skip(kind_of_field)
        return RowGroup(num_rows=numbers.get(3, -1), total_bytes=numbers.get(2, -1), chunks=chunks)

    def _chunk(self, kind: int) -> ColumnChunk:
        metadata: dict[int, int] = {}
        for number, kind_of_field in self._fields_of(kind):
            if (number, kind_of_field) == (3, _STRUCT):
                self._take_numbers(metadata)
            else:
                self._skip(kind_of_field)
        start, dictionary = metadata.get(9, -1), metadata.get(11, 0)
        start = dictionary if 0 < dictionary < start else start
        return ColumnChunk(
            num_values=metadata.get(5, -1),
            decompressed_bytes=metadata.get(6, -1),
            start=start,
            end=start + metadata.get(7, -1),
        )

    def _take_numbers(self, numbers: dict[int, int]) -> None:
        for number, kind in self._fields():
            if kind in (_INT32, _INT64):
                numbers[number] = self._number()
            else:
                self._skip(kind)

    def _fields_of(self, kind: int) -> Iterator[tuple[int, int]]:
        if kind != _STRUCT:
            raise ValueError(f"a list of type {kind} in the place of structs")
        return self._fields()

    def _fields(self) -> Iterator[tuple[int, int]]:
        """Yield id and type of each field; whoever takes them reads or skips the value before the next."""
        number = 0
        while True:
            head = self._byte()
            if head == 0:
                return
            number = number + (head >> 4) if head >> 4 else self._number()
            yield number, head & 15

    def _elements(self) -> Iterator[int]:
        """Yield the type of each element of a list; see `_fields`."""
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._unsigned()
        kind = 3 if head & 15 in (1, 2) else head & 15  # in a list a truth value takes a byte
        for _ in range(size):
            self._num_entries += 1
            if self._num_entries > _MAX_FOOTER_ENTRIES:
                raise ValueError(f"a footer of more than {_MAX_FOOTER_ENTRIES} entries; write larger row groups")
            yield kind

    def _skip(self, kind: int, depth: int = 0) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"structs in more than {_MAX_DEPTH} structs")
        match kind:
            case 1 | 2:
                pass
            case 3:
                self._byte()
            case 4 | 5 | 6:
                self._unsigned()
            case 7:
                self._skip_bytes(8)
            case 8:
                self._skip_bytes(self._unsigned())
            case 9 | 10:
                for kind_of_element in self._elements():
                    self._skip(kind_of_element, depth + 1)
            case 12:
                for _, kind_of_field in self._fields():
                    self._skip(kind_of_field, depth + 1)
            case _:
                raise ValueError(f"a field of type {kind}, which Parquet does not have")

    def _skip_bytes(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > len(self._data):
            raise IndexError("the data end within a text")

    def _byte(self) -> int:
        value = self._data[self.position]
        self.position += 1
        return value

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _number(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
