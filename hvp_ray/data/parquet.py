"""Parquet in the Hugging Face image layout: a column `image: struct<bytes, path>` and a column of labels.

On this machine or behind a URI. An image costs the reading of its row group, so row groups are kept in a bounded cache that
all processes of a node share (`block_cache.py`), and `data.order` visits samples so that neighbouring steps read few row
groups. What a row group will take is known before it is read (`parquet_limits.py`). Opening reads footers only, and keeps a
few numbers for each row group.
"""

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvp_ray.data.block_cache import BlockCache, EncodedBlock
from hvp_ray.data.files import FileSet, StorageError
from hvp_ray.data.listing import LeftOut
from hvp_ray.data.parquet_labels import describe_label_problem, listed_names, merge_names, read_labels
from hvp_ray.data.parquet_limits import ParquetFile, open_parquet
from hvp_ray.data.source import MAX_LABEL, UNLABELLED
from hvp_ray.errors import DataError, LabelError
from hvp_ray.remote_files import retried

PARQUET_SUFFIXES = (".parquet", ".pq")

_ROWS_WITHOUT_QUESTION = 2**20
_BYTES_PER_ROW = 16
"""Of more rows than `_ROWS_WITHOUT_QUESTION`, each must take so many bytes of the files; no image is smaller."""

_BATCH_BYTES = 64 * 2**20
_REQUESTS_AT_ONCE = 16
_OPEN_FILES = 32
_TRAINING_SPLIT = "train"
_OTHER_SPLITS = ("test", "validation", "val", "dev")


def may_hold_images(files: FileSet, image_column: str) -> bool:
    """Tell whether a Parquet file of a set looks like one of images; tables about images (paths, digests) do not.

    It does with bytes in the column of images, and with a struct of bytes in any column, as Hugging Face's images are.
    """
    for name in files.names(*PARQUET_SUFFIXES):
        try:
            schema = open_parquet(files.open(name)).arrow.schema_arrow
        except DataError:
            return True  # opening the source says what is wrong with it
        if any(_has_bytes(field.type) or (field.name == image_column and _is_binary(field.type)) for field in schema):
            return True
    return False


class ParquetSource:
    """Images in Parquet files; ids count the rows of the sorted files. Implements `Source`."""

    kind = "images in Parquet files"
    """See `Source`."""

    def __init__(
        self,
        files: FileSet,
        *,
        image_column: str,
        label_column: str,
        cache_bytes: int,
        max_row_group_bytes: int,
        max_image_bytes: int,
    ) -> None:
        """Read the footers.

        Args:
            files: the Parquet files, and maybe others.
            image_column: see `DataConfig`.
            label_column: see `DataConfig`.
            cache_bytes: disk of this node for decompressed row groups. 0: the last row group, in memory.
            max_row_group_bytes: a row group with more bytes of images is refused.
            max_image_bytes: larger images are returned as no bytes.

        Raises:
            DataError: there are several splits; or a file is no Parquet, is damaged, has other columns, or is made to take
                too much memory.
            StorageError: a file cannot be read.
        """
        self._files = files
        self._names = files.names(*PARQUET_SUFFIXES)
        _refuse_splits(files, self._names)
        self._image_column = image_column
        self._label_column = label_column
        self._max_row_group_bytes = max_row_group_bytes
        self._max_image_bytes = max_image_bytes
        self._open: OrderedDict[int, ParquetFile] = OrderedDict()
        footers = self._read_footers()
        self._file_starts = np.cumsum([0, *(footer.num_rows for footer in footers)])
        self._file_of_group = np.repeat(
            np.arange(len(footers), dtype=np.int32), [len(footer.groups) for footer in footers]
        )
        self._groups = np.concatenate([footer.groups for footer in footers])
        sizes = np.concatenate([footer.group_rows for footer in footers])
        if not len(sizes):
            raise DataError(
                f"{files.shown(self._names[0])} has no rows"
                if len(footers) == 1
                else f"none of {len(footers)} files of {files.location} has rows"
            )
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._check_rows()
        self._num_image_bytes = sum(footer.image_bytes for footer in footers)
        self._fingerprint = _digest(footer.digest for footer in footers)
        self._label_problems = [footer.label_problem for footer in footers if footer.label_problem is not None]
        self._labels: NDArray[np.int64] | None = None
        self._class_names: tuple[str, ...] = ()
        # Files of the same names and sizes need not have the same images: the place and the time are part of the key.
        key = f"{files.state} {self._fingerprint} {image_column} {max_image_bytes}"
        self._cache = BlockCache(key, max_bytes=cache_bytes)
        pa.default_memory_pool().release_unused()  # what parsing footers took

    @property
    def num_samples(self) -> int:
        """Rows of all files."""
        return int(self._starts[-1])

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """See `Source`."""
        return self._files.left_out_beside(self._names)

    @property
    def num_bytes(self) -> int:
        """Bytes of the column with images, decompressed, as the footers say."""
        return self._num_image_bytes

    @property
    def num_bytes_read(self) -> int:
        """Bytes that the storage has handed out to this process: footers, and columns as they are in the files."""
        return self._files.num_bytes_read

    @property
    def has_labels(self) -> bool:
        """Whether all files have a column that can hold labels."""
        return not self._label_problems

    def load_labels(self) -> NDArray[np.int64]:
        """Return the label column: numbers, or places in `load_class_names`."""
        if self._labels is None:
            self._labels, self._class_names = self._read_labels()
        return self._labels

    def load_class_names(self) -> tuple[str, ...]:
        """Return the names of a `ClassLabel` in their order, or the texts of the label column, sorted."""
        self.load_labels()
        return self._class_names

    @property
    def block_starts(self) -> NDArray[np.int64] | None:
        """Row groups."""
        return self._starts[:-1]

    @property
    def reads_whole_blocks(self) -> bool:
        """True: pages are compressed, and hold many images."""
        return True

    def fingerprint(self) -> str:
        """Digest of file names, row counts and the footers' sizes and offsets."""
        return self._fingerprint

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the images' bytes; null, or larger than allowed: no bytes, which counts as unreadable."""
        blocks = np.searchsorted(self._starts, np.asarray(sample_ids), side="right") - 1
        images: list[bytes] = [b""] * len(sample_ids)
        # Block by block, so that a batch never reads a row group twice, however small the cache is. What is there comes
        # first, and processes begin with different ones of the others, so that they do not wait for each other.
        wanted = np.unique(blocks).tolist()
        turn = os.getpid() % len(wanted)
        missing = [block for block in wanted[turn:] + wanted[:turn] if not self._cache.holds(block)]
        for block in [block for block in wanted if block not in set(missing)] + missing:
            positions = np.flatnonzero(blocks == block).tolist()
            rows = [sample_ids[position] - int(self._starts[block]) for position in positions]
            found = self._cache.read(block, rows, lambda block=block: self._read_block(block))  # type: ignore[misc]
            for position, image in zip(positions, found, strict=True):
                images[position] = image
        return images

    def shares_files_with(self, other: "ParquetSource") -> bool:
        """Tell whether a file is among those of both sources."""
        return not self._files.places(self._names).isdisjoint(other._files.places(other._names))

    def describe(self, sample_id: int) -> str:
        """Name file and row."""
        file_index = int(np.searchsorted(self._file_starts, sample_id, side="right")) - 1
        return f"{self._files.shown(self._names[file_index])} row {sample_id - int(self._file_starts[file_index])}"

    def _read_footers(self) -> list["_Footer"]:
        if not self._files.is_remote:
            return [self._read_footer(name) for name in self._names]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            read = lambda name: retried(lambda: self._read_footer(name), f"reading {self._files.shown(name)}")
            return list(pool.map(read, self._names))

    def _read_footer(self, name: str) -> "_Footer":
        """Read and check what one file says about itself."""
        file = open_parquet(self._files.open(name))
        leaf = _image_leaf(file, self._image_column)
        used = [index for index, group in enumerate(file.groups) if group.num_rows]
        rows = np.array([file.groups[index].num_rows for index in used], np.int64)
        self._check_file_rows(file.path, int(rows.sum()), self._files.num_bytes_of(name))
        file.check_column(leaf)
        for index in used:
            self._check_group_bytes(file.path, index, file.groups[index].chunks[leaf].decompressed_bytes)
        lines = [f"{name.rpartition('/')[2]}\0{self._files.num_bytes_of(name)}\0{file.num_rows}\n"]
        lines += [f"{group.num_rows} {group.total_bytes}\n" for group in file.groups]
        return _Footer(
            groups=np.array(used, np.int32),
            group_rows=rows,
            image_bytes=sum(file.groups[index].chunks[leaf].decompressed_bytes for index in used),
            label_problem=describe_label_problem(file, self._label_column),
            digest="".join(lines).encode(),
        )

    def _parquet_file(self, file_index: int) -> ParquetFile:
        """Return a file with its footer; of the last ones the footer is still there."""
        if file_index in self._open:
            self._open.move_to_end(file_index)
            return self._open[file_index]
        file = self._open[file_index] = open_parquet(self._files.open(self._names[file_index]))
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return file

    def _read_block(self, block: int) -> EncodedBlock:
        """Read the images of a row group: at once where it is known to fit, else in parts that are added up."""
        file = self._parquet_file(int(self._file_of_group[block]))
        group, limit = int(self._groups[block]), self._max_row_group_bytes
        leaf = _image_leaf(file, self._image_column)
        if group >= len(file.groups) or file.groups[group].num_rows != self._starts[block + 1] - self._starts[block]:
            raise DataError(f"{file.path} is not what it was when it was opened; start again")
        chunk = file.groups[group].chunks[leaf]
        self._check_group_bytes(file.path, group, chunk.end - chunk.start)
        file.fetch(group, leaf)
        try:
            cost = file.measure(group, leaf)
            self._check_group_bytes(file.path, group, cost.page_bytes)
            columns = [file.leaf_path(leaf)]
            if cost.decoded_bytes <= limit:
                column = file.arrow.read_row_group(group, columns=columns).column(0)
                return _encoded_block([_images(part) for part in column.chunks], self._max_image_bytes)
            parts: list[pa.Array] = []
            num_bytes = 0
            num_rows = max(1, min(limit, _BATCH_BYTES) // cost.largest_page_bytes)
            for batch in file.arrow.iter_batches(batch_size=num_rows, row_groups=[group], columns=columns):
                parts.append(_images(batch.column(0)))
                num_bytes += parts[-1].nbytes
                self._check_group_bytes(file.path, group, num_bytes)
            return _encoded_block(parts, self._max_image_bytes)
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.path}: row group {group} is damaged: {error}") from error
        finally:
            file.release()

    def _check_group_bytes(self, path: str, group: int, num_bytes: int) -> None:
        if not 0 <= num_bytes <= self._max_row_group_bytes:
            raise DataError(
                f"{path}: row group {group} has {num_bytes / 2**20:.0f} MiB of images or more, and "
                f"data.max_row_group_mib={self._max_row_group_bytes // 2**20}; write the file with smaller row groups, or "
                f"raise the limit where all workers have the memory"
            )

    def _check_file_rows(self, path: str, num_rows: int, num_bytes: int) -> None:
        if num_rows > max(_ROWS_WITHOUT_QUESTION, num_bytes // _BYTES_PER_ROW):
            raise DataError(
                f"{path}: {num_rows} rows in {num_bytes} bytes cannot be images (at least {_BYTES_PER_ROW} bytes each)"
            )

    def _check_rows(self) -> None:
        num_bytes = sum(map(self._files.num_bytes_of, self._names))
        self._check_file_rows(
            f"{self._files.shown(self._names[0])}{' and others' if len(self._names) > 1 else ''}",
            self.num_samples,
            num_bytes,
        )

    def _read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the labels of all files, and the names of the classes."""
        if self._label_problems:
            without, of_all = len(self._label_problems), len(self._names)
            some = "" if of_all == 1 else f"{without if without < of_all else 'all'} of {of_all} files have no labels; "
            raise LabelError(some + self._label_problems[0])
        labels = np.empty(self.num_samples, np.int64)
        names: list[tuple[str, ...]] = [()] * len(self._names)
        listed = [False] * len(self._names)

        def read(file_index: int) -> None:
            start = int(self._file_starts[file_index])
            file = open_parquet(self._files.open(self._names[file_index]))
            found: dict[str, int] = {}
            for part in read_labels(file, self._label_column, found, max_bytes=self._max_row_group_bytes):
                labels[start : start + len(part)] = part[: len(labels) - start]
                start += len(part)
            if start != self._file_starts[file_index + 1]:
                raise LabelError(f"{file.path}: {start} labels do not fit to the images; the file is damaged")
            own = labels[self._file_starts[file_index] : start]
            list_of_names = () if found else listed_names(file, self._label_column)
            names[file_index], listed[file_index] = tuple(found) or list_of_names, bool(list_of_names)
            self._check_labels(file.path, own, list_of_names)

        pauses = None if self._files.is_remote else ()
        what = f"reading labels of {self._files.location}"
        read_again = lambda index: retried(lambda: read(index), what, pauses=pauses)
        try:
            with ThreadPoolExecutor(_REQUESTS_AT_ONCE if self._files.is_remote else 1) as pool:
                list(pool.map(read_again, range(len(self._names))))
        except OSError as error:
            raise DataError(f"the labels of {self._files.location} cannot be read: {error}") from error
        starts = self._file_starts.tolist()
        return labels, merge_names(labels, starts, names, are_listed=all(listed))

    def _check_labels(self, path: str, labels: NDArray[np.int64], names: tuple[str, ...]) -> None:
        largest = len(names) - 1 if names else MAX_LABEL
        if len(labels) and (labels.min() < UNLABELLED or labels.max() > largest):
            raise LabelError(
                f"{path}: column {self._label_column!r} has values from {labels.min()} to {labels.max()}; expected classes "
                f"from 0 to {largest}, or {UNLABELLED} for none. Name another column by --data.label_column"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Footer:
    """What is kept of a file's footer."""

    groups: NDArray[np.int32]
    """Row groups that have rows."""
    group_rows: NDArray[np.int64]
    image_bytes: int
    label_problem: str | None
    """Why the file has no labels; None: it has."""
    digest: bytes

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return int(self.group_rows.sum())


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _refuse_splits(files: FileSet, names: list[str]) -> None:
    """Check that images of a training split and of another one are not trained on together.

    Raises:
        DataError: some files are of the training split by their names, and others of another one.
    """
    words = {name: set(_words(name)) for name in names}
    training = next((name for name in names if _TRAINING_SPLIT in words[name].difference(_OTHER_SPLITS)), None)
    of_others = [name for name in names if _TRAINING_SPLIT not in words[name]]
    others = {split: name for split in _OTHER_SPLITS for name in of_others if split in words[name]}
    if training is None or not others:
        return
    other = next(iter(others))
    raise DataError(
        f"{files.location} has files of several splits ({', '.join([_TRAINING_SPLIT, *others])}), and images of all of them "
        f"would be trained on. Give one for each purpose: --data.source '{_pattern(files, training, _TRAINING_SPLIT)}' "
        f"--data.test_source '{_pattern(files, others[other], other)}'"
    )


def _pattern(files: FileSet, name: str, split: str) -> str:
    """Return what names the files of a split: the folder of its name, or a pattern of files like this one."""
    query = files.location.partition("?")[2] if files.is_remote else ""
    found = re.search(rf"(?i)(?:^|(?<=[-/._])){split}(?=[-/._])", name)
    assert found is not None
    rest, pattern = name[found.end() :], name[: found.end()]
    suffix = rest[rest.rfind(".") :]
    if "/" not in rest:
        pattern += suffix if rest == suffix else f"{rest[0]}*{suffix}"
    return files.shown(pattern) + (f"?{query}" if query else "")


def _words(name: str) -> list[str]:
    """Return the words of a file's name and folders: data/train-00000-of-00001.parquet has train."""
    for mark in "/._":
        name = name.replace(mark, "-")
    return name.lower().split("-")


def _encoded_block(parts: list[pa.Array], max_bytes: int) -> EncodedBlock:
    """Return images as Arrow has them, without a copy; null, or larger than `max_bytes`: no bytes."""
    entries = np.zeros((sum(map(len, parts)), 2), np.int64)
    data: list[memoryview] = []
    row = begin = 0
    for part in parts:
        some = entries[row : row + len(part)]
        row += len(part)
        _, offsets, values = part.buffers()
        if values is None or not len(part):
            continue
        kind = np.dtype(np.int64 if pa.types.is_large_binary(part.type) else np.int32)
        ends = np.frombuffer(offsets, kind, len(part) + 1, part.offset * kind.itemsize)
        first, last = int(ends[0]), int(ends[-1])
        np.subtract(ends[1:], ends[:-1], out=some[:, 1])
        some[:, 0] = ends[:-1]
        some[:, 0] += begin - first
        some[(some[:, 1] > max_bytes) | np.asarray(part.is_null()), 1] = 0
        data.append(memoryview(values)[first:last])
        begin += last - first
    return EncodedBlock(entries=entries, data=data)


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
    leaf = f"{image_column}.bytes" if _has_bytes(kind) else image_column
    if not _is_binary(kind) and not _has_bytes(kind):
        raise DataError(
            f"{path}: column {image_column!r} has type {str(kind)[:200]}; expected struct<bytes: binary, path: string> "
            f"or binary"
        )
    return file.find_leaf(leaf)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _has_bytes(kind: pa.DataType) -> bool:
    """Tell whether a type is that of Hugging Face's images: a struct with one field `bytes`."""
    if not pa.types.is_struct(kind) or [field.name for field in kind].count("bytes") != 1:
        return False
    return _is_binary(kind.field("bytes").type)
