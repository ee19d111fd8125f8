"""Parquet with a column of encoded images, as Hugging Face writes it or plain binary, and maybe one of labels (`columns.py`).

The files lie on this machine or at a URI. An image costs reading its row group. So the processes of a node share a cache
of row groups (`block_cache.py`), and `data.order` sorts samples so that neighbouring steps read few row groups. Opening reads
footers only and keeps a few numbers for each row group (`parquet_footer.py`).
"""

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.block_cache import BlockCache, EncodedBlock
from hvp_ray.data.columns import ColumnNames, listed_names
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.label_values import check_range, merge_names, read_numbers
from hvp_ray.data.parquet_footer import REQUESTS_AT_ONCE, FileSummary, ParquetFile, read_summaries, too_large
from hvp_ray.data.source import Place, Source
from hvp_ray.errors import DataError, LabelError
from hvp_ray.files import retried

PARQUET_SUFFIXES = (".parquet", ".pq")

_UNCHECKED_ROWS = 2**20
_MIN_BYTES_PER_ROW = 16
"""Files with more rows than `_UNCHECKED_ROWS` must average at least this many bytes per row. No image is smaller."""

_OPEN_FILES = 32
_TRAINING_SPLIT = "train"
_OTHER_SPLITS = ("test", "validation", "val", "dev")


def open_parquet(place: Place) -> Source | None:
    """Return the Parquet files that lie there. Beside files of other formats, only those that may hold images count.

    Raises:
        DataError: they cannot be used.
    """
    names = place.files.names(*PARQUET_SUFFIXES)
    is_alone = not place.has_images and set(place.files.names(*place.endings)) == set(names)
    if not names or not (is_alone or _may_hold_images(place.files, names, place.config)):
        return None
    try:
        return ParquetSource(place.files, place.config, cache_bytes=place.cache_bytes)
    except _PathsOnlyError as error:
        if place.files.is_single:
            return None
        raise DataError(f"{error}. To read a file as an image list, name the file itself") from error


def _may_hold_images(files: FileSet, names: list[str], config: DataConfig) -> bool:
    """Tell whether a file of a set looks like one of images. Tables about images (paths, digests) do not."""
    for found in read_summaries(files, names, columns_of(config)):
        if isinstance(found, DataError) or found.may_hold_images:
            return True  # if it is damaged, opening the source reports how
    return False


class _PathsOnlyError(DataError):
    """A file has paths of images, and no images."""


class ParquetSource(Source):
    """Images in Parquet files; ids count the rows of the sorted files."""

    kind = "images in Parquet files"
    reads_whole_blocks = True

    def __init__(self, files: FileSet, config: DataConfig, *, cache_bytes: int) -> None:
        """Read the footers.

        Args:
            files: the Parquet files, and maybe others.
            config: columns and limits.
            cache_bytes: disk of this node for decompressed row groups. 0: keep the last row group, in memory.

        Raises:
            DataError: there are several splits; or a file is no Parquet, is damaged, has other columns, or is made to take
                too much memory.
            StorageError: a file cannot be read.
        """
        self._files = files
        self._names = files.names(*PARQUET_SUFFIXES)
        _refuse_splits(files, self._names)
        self.left_out = files.left_out_beside(self._names)
        self._config = config
        self._max_row_group_bytes = config.max_row_group_mib * 2**20
        self._open: OrderedDict[int, ParquetFile] = OrderedDict()
        self._label_problems: list[str] = []
        self._image_paths: list[str] = []
        self._label_paths: list[str] = []
        with closing(read_summaries(files, self._names, columns_of(config))) as summaries:
            self._gather(summaries)
        self.has_labels = not self._label_problems
        self.num_samples, self.block_starts = int(self._starts[-1]), self._starts[:-1]
        # Files of the same names and sizes need not have the same images, so place and time are part of the key.
        key = f"{files.state} {self._fingerprint} {config.max_image_mib * 2**20}"
        self._cache = BlockCache(key, max_bytes=cache_bytes)

    @property
    def num_bytes_read(self) -> int:
        """Bytes that the storage has returned to this process: footers, and columns as they are in the files."""
        return self._files.num_bytes_read

    def fingerprint(self) -> str:
        """Return a digest of file names, row counts and the footers' sizes."""
        return self._fingerprint

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the images' bytes. No bytes: a null, or an image larger than allowed."""
        blocks = np.searchsorted(self._starts, np.asarray(sample_ids), side="right") - 1
        images: list[bytes] = [b""] * len(sample_ids)
        # Block by block, so that a batch never reads a row group twice, however small the cache is. Cached blocks come
        # first, and each process starts at another one of the rest, so that processes do not wait for each other.
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

    def places(self) -> set[str]:
        """Return the Parquet files."""
        return self._files.places(self._names)

    def describe(self, sample_id: int) -> str:
        """Return file and row."""
        file_index = int(np.searchsorted(self._file_starts, sample_id, side="right")) - 1
        return f"{self._files.shown(self._names[file_index])} row {sample_id - int(self._file_starts[file_index])}"

    def _gather(self, summaries: Iterable[FileSummary | DataError]) -> None:
        """Check the summaries, and keep them as arrays over all files."""
        digest = hashlib.sha256()
        file_rows: list[int] = []
        group_rows, group_numbers, images, labels = [], [], [], []
        for name, found in zip(self._names, summaries, strict=True):
            if isinstance(found, DataError):
                raise found
            if found.images.problem:
                raise (DataError if found.paths.problem else _PathsOnlyError)(found.images.problem)
            used = np.flatnonzero(found.group_rows)
            file_rows.append(int(found.group_rows.sum()))
            self._check_rows(self._files.shown(name), file_rows[-1], self._files.sizes[name])
            for group in used.tolist():
                self._check_bytes(name, group, found.images.path, int(found.images.chunks[group, 2]))
            group_rows.append(found.group_rows[used])
            group_numbers.append(used.astype(np.int32))
            images.append(found.images.chunks[used])
            self._image_paths.append(found.images.path)
            self._label_paths.append(found.labels.path)
            if found.labels.problem:
                self._label_problems.append(found.labels.problem)
            else:
                labels.append(found.labels.chunks[used])
            digest.update(_digested(name, self._files.sizes[name], found))
        self._file_starts = np.cumsum([0, *file_rows])
        self._file_of_group = np.repeat(np.arange(len(file_rows), dtype=np.int32), [len(rows) for rows in group_rows])
        self._groups = np.concatenate(group_numbers)
        self._starts = np.concatenate([[0], np.cumsum(np.concatenate(group_rows))]).astype(np.int64)
        self._images, self._label_chunks = (
            np.concatenate(images),
            np.concatenate(labels or [np.zeros((0, 4), np.int64)]),
        )
        first = self._files.shown(self._names[0])
        if not len(self._groups):
            one, some = f"{first} has no rows", f"none of {len(file_rows)} files of {self._files.location} has rows"
            raise DataError(one if len(file_rows) == 1 else some)
        num_bytes = sum(self._files.sizes[name] for name in self._names)
        self._check_rows(first + " and others" * (len(file_rows) > 1), sum(file_rows), num_bytes)
        self.num_bytes = int(self._images[:, 2].sum())
        self._fingerprint = digest.hexdigest()

    def _parquet_file(self, file_index: int) -> ParquetFile:
        """Return an open file; the footers of the last ones stay in memory."""
        if file_index in self._open:
            self._open.move_to_end(file_index)
            return self._open[file_index]
        file = self._open[file_index] = ParquetFile(self._files.open(self._names[file_index]))
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return file

    def _read_block(self, block: int) -> EncodedBlock:
        """Read the images of a row group."""
        file_index, group = int(self._file_of_group[block]), int(self._groups[block])
        file, path = self._parquet_file(file_index), self._image_paths[file_index]
        if not file.has_group(group, int(self._starts[block + 1] - self._starts[block])):
            raise DataError(f"{file.path} has changed since it was opened; start again")
        num_bytes = 0

        def take(part: pa.Array) -> pa.Array:
            nonlocal num_bytes
            num_bytes += part.nbytes
            self._check_bytes(self._names[file_index], group, path, num_bytes)
            return part

        limit = self._max_row_group_bytes
        parts = file.read_column(path, group, self._images[block], max_bytes=limit, convert=take)
        return _encoded_block(parts, self._config.max_image_mib * 2**20)

    def _check_bytes(self, name: str, group: int, column: str, num_bytes: int) -> None:
        if num_bytes > self._max_row_group_bytes:
            raise DataError(too_large(self._files.shown(name), group, column, num_bytes, self._max_row_group_bytes))

    def _check_rows(self, path: str, num_rows: int, num_bytes: int) -> None:
        if num_rows > max(_UNCHECKED_ROWS, num_bytes // _MIN_BYTES_PER_ROW):
            raise DataError(
                f"{path}: {num_rows} rows in {num_bytes} bytes cannot be images (at least {_MIN_BYTES_PER_ROW} bytes each)"
            )

    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the label column of all files, and the names of a `ClassLabel` in their order, or the texts, sorted."""
        if self._label_problems:
            without, of_all = len(self._label_problems), len(self._names)
            some = "" if of_all == 1 else f"{without if without < of_all else 'all'} of {of_all} files have no labels; "
            raise LabelError(some + self._label_problems[0])
        labels = np.empty(self.num_samples, np.int64)
        names: list[tuple[str, ...]] = [()] * len(self._names)
        listed = [False] * len(self._names)
        first_groups = np.searchsorted(self._file_of_group, np.arange(len(self._names) + 1))

        def read(file_index: int) -> None:
            start, end = self._file_starts[file_index : file_index + 2].tolist()
            file, column = ParquetFile(self._files.open(self._names[file_index])), self._label_paths[file_index]
            found: dict[str, int] = {}
            shown = f"{file.path}: column {column!r}"
            convert = lambda part: read_numbers(part, found, shown)
            parts: list[NDArray[np.int64]] = []
            for place in range(*first_groups[file_index : file_index + 2]):
                group, chunk = int(self._groups[place]), self._label_chunks[place]
                limit = self._max_row_group_bytes
                try:
                    parts += file.read_column(column, group, chunk, max_bytes=limit, convert=convert)
                except DataError as error:  # the images can be used without labels
                    raise LabelError(str(error)) from error
            if sum(map(len, parts)) != end - start:
                raise LabelError(f"{file.path} has more or fewer labels than images; the file is damaged")
            labels[start:end] = np.concatenate([labels[:0], *parts])
            list_of_names = () if found else listed_names(file.schema, column)
            names[file_index], listed[file_index] = tuple(found) or list_of_names, bool(list_of_names)
            check_range(labels[start:end], list_of_names, shown, "Name another column by --data.label_column")

        pauses = None if self._files.is_remote else ()
        what = f"reading labels of {self._files.location}"
        read_again = lambda index: retried(lambda: read(index), what, pauses=pauses)
        try:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE if self._files.is_remote else 1) as pool:
                list(pool.map(read_again, range(len(self._names))))
        except OSError as error:
            raise DataError(f"the labels of {self._files.location} cannot be read: {error}") from error
        starts = self._file_starts.tolist()
        return labels, merge_names(labels, starts, names, are_listed=all(listed))


def columns_of(config: DataConfig) -> ColumnNames:
    """Return the columns that the options name."""
    return ColumnNames(image=config.image_column, label=config.label_column)


def _digested(name: str, num_bytes: int, summary: FileSummary) -> bytes:
    """Return what the fingerprint covers of a file: name, size, row groups, and the column of images."""
    rows, group_bytes = summary.group_rows.tolist(), summary.group_bytes.tolist()
    lines = [f"{name.rpartition('/')[2]}\0{num_bytes}\0{sum(rows)}\0{summary.images.path}\n"]
    return "".join([*lines, *(f"{own} {of_all}\n" for own, of_all in zip(rows, group_bytes, strict=True))]).encode()


def _refuse_splits(files: FileSet, names: list[str]) -> None:
    """Check that a source does not mix images of a training split with those of another split.

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
