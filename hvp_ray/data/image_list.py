"""An image list: a CSV, TSV or Parquet file with a column of paths, and maybe one of labels.

Paths are relative to the folder of the list, or absolute. Columns are found by `columns.py`. A list must be named itself:
in a folder of images it is only a table beside them.
"""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pc
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.columns import find_labels, find_paths, listed_names
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.image_files import PATHS_AT_ONCE, ImageFiles
from hvp_ray.data.image_suffixes import IMAGE_SUFFIXES
from hvp_ray.data.label_values import labels_of
from hvp_ray.data.parquet import columns_of
from hvp_ray.data.parquet_footer import ColumnSummary, ParquetFile, read_summaries
from hvp_ray.data.source import Place, Source
from hvp_ray.errors import DataError, LabelError, first_line

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
LIST_SUFFIXES = tuple(_DELIMITERS)
_MAX_LIST_BYTES = 2**30


def open_image_list(place: Place) -> Source | None:
    """Return the images of a list that is named itself. A Parquet file with images was recognised before.

    Raises:
        DataError: the list cannot be used, or none of its images exists.
    """
    if not place.files.is_single or not place.files.names(*LIST_SUFFIXES, ".parquet", ".pq"):
        return None
    if place.path is None:
        raise DataError(
            f"data.source={place.location!r} is an image list; lists and their images are read from this machine only: "
            f"download them, or pack them into shards"
        )
    return ImageListSource(place.files, place.config)


class ImageListSource(ImageFiles):
    """Images that a list names; ids are its rows."""

    kind = "images of a list"

    def __init__(self, files: FileSet, config: DataConfig) -> None:
        """Read the list, and the sizes of all files.

        Args:
            files: the list.
            config: columns and limits.

        Raises:
            DataError: the list is damaged, has no column of paths, or none of its files exists.
        """
        (name,) = files.sizes
        self._list = files.shown(name)
        read = _read_csv if name.lower().endswith(LIST_SUFFIXES) else _read_parquet
        paths, self._load, self._label_problem = read(files, name, config)
        self.has_labels = not self._label_problem
        root = Path(self._list).parent
        sizes = _sizes_of(root, paths)
        if not len(paths):
            raise DataError(f"{self._list} has no rows")
        if not sizes.any():
            raise DataError(
                f"none of the {len(paths)} files of {self._list} exists, for instance "
                f"{root / os.fsdecode(paths[0].as_py())}; expected absolute paths, or paths relative to the "
                f"folder of the list"
            )
        super().__init__(root, paths, sizes, max_image_bytes=config.max_image_mib * 2**20)

    def num_repeated_images(self) -> int:
        """Return how many rows name a file that another row above names."""
        return len(self._paths) - int(pa.compute.count_distinct(self._paths).as_py())

    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the label column, and its texts, sorted, or the names that the schema lists for its numbers."""
        if self._label_problem:
            raise LabelError(self._label_problem)
        return self._load()


_Load = Callable[[], tuple[NDArray[np.int64], tuple[str, ...]]]
_Columns = tuple[pa.LargeBinaryArray, _Load, str]
"""Paths, a function that returns labels and class names, and why there are no labels."""


def _read_csv(files: FileSet, name: str, config: DataConfig) -> _Columns:
    """Read paths and labels of a text file whose first line names the columns."""
    shown = files.shown(name)
    copy = pa.BufferOutputStream()  # Arrow's threads must not hold Python objects, see ParquetFile
    copy.write(files.read(name, max_bytes=_MAX_LIST_BYTES))
    content = copy.getvalue()
    parse = pc.ParseOptions(delimiter=_DELIMITERS[Path(name).suffix.lower()], newlines_in_values=True)
    try:
        header = pc.read_csv(pa.BufferReader(content), parse_options=parse).schema
        as_text = pa.schema([(field.name, pa.string()) for field in header])
        paths = find_paths(as_text, config.image_column)
        if paths.problem and any(column.lower().endswith(IMAGE_SUFFIXES) for column in header.names):
            raise DataError(f"{shown} has no line of column names; add one, for instance path,label")
        if paths.problem:
            raise DataError(f"{shown}{paths.problem}")
        labels = find_labels(header, config.label_column)
        convert = pc.ConvertOptions(
            column_types={paths.path: pa.string()},
            include_columns=[paths.path] if labels.problem else [paths.path, labels.path],
            strings_can_be_null=True,
        )
        table = pc.read_csv(pa.BufferReader(content), parse_options=parse, convert_options=convert)
    except pa.ArrowException as error:
        raise DataError(f"{shown} cannot be read as an image list: {first_line(error)}") from error
    problem = f"{shown}{labels.problem}" if labels.problem else ""
    load = lambda: labels_of(table[labels.path].chunks, (), f"{shown}: column {labels.path!r}")
    return _as_paths(table[paths.path].chunks), load, problem


def _read_parquet(files: FileSet, name: str, config: DataConfig) -> _Columns:
    """Read paths and labels of a Parquet file."""
    with closing(read_summaries(files, [name], columns_of(config))) as summaries:
        (summary,) = summaries
    if isinstance(summary, DataError):
        raise summary
    if summary.paths.problem:
        raise DataError(summary.paths.problem)
    file, limit = ParquetFile(files.open(name)), config.max_row_group_mib * 2**20

    def values_of(column: ColumnSummary) -> list[pa.Array]:
        parts = [
            file.read_column(column.path, group, chunk, max_bytes=limit, convert=lambda part: part)
            for group, chunk in enumerate(column.chunks)
        ]
        return [part for of_group in parts for part in of_group]

    def load() -> tuple[NDArray[np.int64], tuple[str, ...]]:
        column = summary.labels
        return labels_of(
            values_of(column), listed_names(file.schema, column.path), f"{file.path}: column {column.path!r}"
        )

    return _as_paths(values_of(summary.paths)), load, summary.labels.problem


def _as_paths(parts: list[pa.Array]) -> pa.LargeBinaryArray:
    """Return texts as bytes; a null is an empty path."""
    texts = [part.cast(pa.large_string()).fill_null("").cast(pa.large_binary()) for part in parts]
    return pa.concat_arrays([pa.array([], pa.large_binary()), *texts])


def _sizes_of(root: Path, paths: pa.LargeBinaryArray) -> NDArray[np.int64]:
    """Return the sizes of all files, [N]; 0: there is no such file."""
    sizes = np.zeros(len(paths), np.int64)
    for start in range(0, len(paths), PATHS_AT_ONCE):
        for place, path in enumerate(paths[start : start + PATHS_AT_ONCE].to_pylist(), start):
            try:
                sizes[place] = os.stat(os.path.join(root, os.fsdecode(path))).st_size if path else 0
            except (OSError, ValueError):
                continue  # reading reports it
    return sizes
