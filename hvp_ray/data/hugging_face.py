"""A data set that Hugging Face's `datasets` saved to disk (`Dataset.save_to_disk`): Arrow stream files and two JSON files.

The files are mapped into memory, so an image costs its own bytes only. Reading needs no `datasets` library.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.columns import bytes_path, find_images, find_labels, listed_names
from hvp_ray.data.file_set import FileSet
from hvp_ray.data.label_values import labels_of
from hvp_ray.data.limited_process import limited_memory
from hvp_ray.data.source import Place, Source
from hvp_ray.errors import DataError, LabelError, first_line
from hvp_ray.files import is_inside

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
MARKS = (_STATE, _INFO, _SPLITS)
"""Names of the JSON files."""

_MAX_JSON_BYTES = 64 * 2**20
_MEMORY_BYTES = 2 * 2**30
"""Bound on memory for opening a file. Files that Hugging Face writes take none, because they are not compressed."""
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""End of an Arrow stream. Without it, a file that was cut between two batches would have fewer rows."""
_ARROW_ERRORS = (pa.ArrowException, OSError, MemoryError, OverflowError, ValueError, EOFError)


def open_hugging_face(place: Place) -> Source | None:
    """Return the data set that was saved there.

    Raises:
        DataError: it cannot be used, or has several splits.
    """
    if _SPLITS in place.files.sizes and not place.files.is_single:
        names = _read_json(place.files, _SPLITS).get("splits")
        splits = [str(name) for name in names] if isinstance(names, list) else []
        first = next((name for name in ("train", *splits) if name in splits), "SPLIT")
        raise DataError(
            f"data.source={place.location!r} is a Hugging Face data set of several splits ({', '.join(splits)}); name one: "
            f"--data.source {place.location.rstrip('/')}/{first}"
        )
    if not {_STATE, _INFO} <= place.files.sizes.keys():
        return None
    if place.path is None:
        raise DataError(
            f"data.source={place.location!r} is a Hugging Face data set saved to disk, which is read from this machine only: "
            f"download it, or save it as Parquet (Dataset.to_parquet)"
        )
    return HuggingFaceSource(place.path, place.files, place.config)


class HuggingFaceSource(Source):
    """Images of a saved data set; ids are its rows."""

    kind = "a Hugging Face data set on disk"

    def __init__(self, root: Path, files: FileSet, config: DataConfig) -> None:
        """Map the files.

        Args:
            root: folder of the data set.
            files: its JSON files.
            config: columns and limits.

        Raises:
            DataError: a file is missing or damaged, or there is no column of images.
        """
        self._root = root
        self._max_image_bytes = config.max_image_mib * 2**20
        self._names = _names_of_files(files)
        tables = [_map(root / name) for name in self._names]
        if len({table.schema.remove_metadata() for table in tables}) > 1:
            raise DataError(f"{root}: its Arrow files have different columns; save the data set again")
        self._shown = str(root / self._names[0])
        self._schema = tables[0].schema
        column = find_images(self._schema, config.image_column)
        if column.problem:
            raise DataError(f"{self._shown}{column.problem}")
        path = bytes_path(self._schema, column.path)
        parts = [_checked_values(root / name, table, path) for name, table in zip(self._names, tables, strict=True)]
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.num_samples = int(self._starts[-1])
        if not self.num_samples:
            raise DataError(f"{root} has no rows")
        self._images = pa.chunked_array([chunk for part in parts for chunk in part.chunks])
        lengths = [pc.binary_length(chunk).fill_null(0).to_numpy(zero_copy_only=False) for chunk in self._images.chunks]
        self._lengths = np.concatenate(lengths).astype(np.int64)
        self.num_bytes = int(self._lengths.sum())
        self._digest = hashlib.sha256(f"{path}\n".encode() + self._lengths.tobytes()).hexdigest()
        self._label = find_labels(self._schema, config.label_column)
        self.has_labels = not self._label.problem
        self._label_parts = [] if self._label.problem else [_values_at(table, self._label.path) for table in tables]

    def read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Return the label column, and the names of a `ClassLabel` in their order, or the texts, sorted."""
        if self._label.problem:
            raise LabelError(f"{self._shown}{self._label.problem}")
        chunks = [chunk for part in self._label_parts for chunk in part.chunks]
        shown = f"{self._shown}: column {self._label.path!r}"
        try:
            for chunk in chunks:
                chunk.validate(full=True)
        except pa.ArrowException as error:
            raise LabelError(f"{shown} is damaged: {first_line(error)}") from error
        return labels_of(chunks, listed_names(self._schema, self._label.path), shown)

    def fingerprint(self) -> str:
        """Return a digest of the sizes of all images, and the name of their column."""
        return self._digest

    def read(self, sample_ids: Sequence[int]) -> list[bytes]:
        """Return the images' bytes. No bytes: a null, or an image larger than allowed."""
        return [
            self._images[sample_id].as_py() or b"" if self._lengths[sample_id] <= self._max_image_bytes else b""
            for sample_id in sample_ids
        ]

    def places(self) -> set[str]:
        """Return the Arrow files."""
        return {str((self._root / name).expanduser().resolve()) for name in self._names}

    def describe(self, sample_id: int) -> str:
        """Return file and row."""
        file_index = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return f"{self._root / self._names[file_index]} row {sample_id - int(self._starts[file_index])}"


def _names_of_files(files: FileSet) -> list[str]:
    """Return the names of the Arrow files, in their order."""
    try:
        names = [entry["filename"] for entry in _read_json(files, _STATE)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{files.shown(_STATE)} names no Arrow files; save the data set again") from error
    if not names or not all(isinstance(name, str) and is_inside(name) for name in names):
        raise DataError(f"{files.shown(_STATE)} names no Arrow files of this folder; save the data set again")
    return names


def _read_json(files: FileSet, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.read(name, max_bytes=_MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{files.shown(name)} is damaged: {first_line(error)}; save the data set again") from error
    return content if isinstance(content, dict) else {}


def _map(path: Path) -> pa.Table:
    """Return the table of a file, whose values stay on the disk."""
    try:
        with limited_memory(_MEMORY_BYTES), pa.memory_map(str(path)) as mapped:
            if mapped.read_at(len(_END), max(0, mapped.size() - len(_END))) != _END:
                raise EOFError("it does not end as Arrow streams do")
            return pa.ipc.open_stream(mapped).read_all()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing, but {_STATE} names it; copy the data set again") from error
    except _ARROW_ERRORS as error:
        raise DataError(f"{path} is damaged or not complete: {first_line(error)}; copy the data set again") from error


def _values_at(table: pa.Table, path: str) -> pa.ChunkedArray:
    """Return a column, or a field of a struct, by its path."""
    name, *fields = path.split(".") if path not in table.schema.names else [path]
    return pc.struct_field(table[name], fields) if fields else table[name]


def _checked_values(path: Path, table: pa.Table, column: str) -> pa.ChunkedArray:
    """Return the values of a column of images whose offsets lie in the file."""
    try:
        values = _values_at(table, column)
        for chunk in values.chunks:
            chunk.validate(full=True)
    except _ARROW_ERRORS as error:
        raise DataError(
            f"{path}: column {column!r} is damaged: {first_line(error)}; copy the data set again"
        ) from error
    return values
