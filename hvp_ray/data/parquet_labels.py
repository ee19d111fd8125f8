"""The labels of Parquet files: which columns can hold them, how they are read in bounded memory, and what they mean.

Integers, booleans and floats without a fraction are numbers. Strings and categories are names, and so are the integers of a
`datasets.ClassLabel`, whose names Hugging Face keeps in the schema's metadata. `parquet.py` decides when to read.
"""

import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvp_ray.data.files import StorageError
from hvp_ray.data.parquet_limits import ParquetFile
from hvp_ray.data.source import MAX_LABEL, UNLABELLED
from hvp_ray.errors import DataError, LabelError, first_line

_LABELS_AT_ONCE = 65_536
_BATCH_BYTES = 64 * 2**20
_MAX_NAMES_BYTES = 64 * 2**20
"""Of all distinct names of a file together; a column with more holds texts, not classes."""


def describe_label_problem(file: ParquetFile, column: str) -> str | None:
    """Return why a file has no labels, from its footer; None: it has.

    Raises:
        DataError: the footer cannot be true.
    """
    schema = file.arrow.schema_arrow
    if schema.names.count(column) != 1:
        shown = f"{schema.names[:20]}{' and more' if len(schema.names) > 20 else ''}"
        return (
            f"{file.path} has {schema.names.count(column) or 'no'} column{'s' * (column in schema.names)} {column!r}; it has "
            f"{shown}. Name the column of labels by --data.label_column"
        )
    kind = schema.field(column).type
    if pa.types.is_null(kind):
        return f"{file.path}: column {column!r} is empty"
    if not _is_number(kind) and not _is_text(kind):
        return (
            f"{file.path}: column {column!r} has type {str(kind)[:200]}; expected integers, strings, categories, booleans, "
            f"or floats without a fraction. Name another column by --data.label_column"
        )
    file.check_column(file.find_leaf(column))
    return None


def read_labels(
    file: ParquetFile, column: str, names: dict[str, int], *, max_bytes: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the labels of a file in order, part by part: numbers, or places in `names`, to which new names are added.

    Args:
        file: one for which `describe_label_problem` returned None.
        column: of labels.
        names: name -> label; stays empty where the column holds numbers.
        max_bytes: a row group with more bytes of labels is refused.

    Raises:
        LabelError: the column is damaged, takes too much memory, or holds no classes.
        StorageError: it cannot be read.
    """
    try:
        for part in _parts(file, column, max_bytes):
            yield _numbers(part) if _is_number(part.type) else _places(part, names)
    except StorageError:
        raise
    except LabelError as error:
        raise LabelError(f"{file.path}: column {column!r} {error}") from error
    except DataError as error:  # pages that are not what the footer says
        raise LabelError(str(error)) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LabelError(f"{file.path}: column {column!r} is damaged: {first_line(error)}") from error
    finally:
        file.release()


def listed_names(file: ParquetFile, column: str) -> tuple[str, ...]:
    """Return the names that Hugging Face keeps for the integers of a column (`ClassLabel`); empty: it keeps none."""
    try:
        metadata = json.loads((file.arrow.schema_arrow.metadata or {})[b"huggingface"])
        feature = metadata["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    is_list = isinstance(names, list) and len(names) <= MAX_LABEL + 1 and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()


def merge_names(
    labels: NDArray[np.int64], starts: Sequence[int], names: Sequence[tuple[str, ...]], *, are_listed: bool
) -> tuple[str, ...]:
    """Give the labels of all files one meaning, in place; return the names of the classes.

    Lists that are alike stay as they are. Other names are united and sorted.

    Args:
        labels: [N], of all files; numbers where no file has names, else places in the names of its file.
        starts: first label of each file, and N.
        names: of each file.
        are_listed: all names come from `listed_names`, so the order of a list has a meaning.

    Raises:
        LabelError: some files have names and others only numbers.
    """
    if are_listed and len(set(names)) == 1:
        return names[0]
    of_files = [labels[start:end] for start, end in itertools.pairwise(starts)]
    with_labels = [bool(own) for own, part in zip(names, of_files, strict=True) if (part != UNLABELLED).any()]
    if not any(with_labels):
        return ()
    if not all(with_labels):
        raise LabelError(
            f"{sum(with_labels)} of {len(with_labels)} files have names of classes, the others only numbers; write all files "
            f"with the same features"
        )
    merged = tuple(sorted(set().union(*names)))
    index = {name: label for label, name in enumerate(merged)}
    for own, part in zip(names, of_files, strict=True):
        places = np.array([*(index[name] for name in own), UNLABELLED], np.int64)  # UNLABELLED points to the last one
        part[:] = places[part]
    return merged


def _is_number(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_number(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _parts(file: ParquetFile, column: str, max_bytes: int) -> Iterator[pa.Array]:
    leaf = file.find_leaf(column)
    # Arrow keeps the values of categories once, and numbers are small; a text can be repeated at the price of a few bits.
    kind = file.arrow.schema_arrow.field(column).type
    is_repeated = _is_text(kind) and not pa.types.is_dictionary(kind)
    for group in range(len(file.groups)):
        chunk = file.groups[group].chunks[leaf]
        page_bytes, num_rows = chunk.end - chunk.start, _LABELS_AT_ONCE
        if page_bytes <= max_bytes:
            file.fetch(group, leaf)
            cost = file.measure(group, leaf)
            page_bytes = cost.page_bytes
            if is_repeated and cost.decoded_bytes > max_bytes:
                num_rows = max(1, min(num_rows, min(max_bytes, _BATCH_BYTES) // cost.largest_page_bytes))
        if page_bytes > max_bytes:
            raise LabelError(f"takes {page_bytes / 2**20:.0f} MiB in row group {group}")
        for batch in file.arrow.iter_batches(batch_size=num_rows, row_groups=[group], columns=[column]):
            yield batch.column(0)


def _numbers(part: pa.Array) -> NDArray[np.int64]:
    if pa.types.is_dictionary(part.type):
        part = part.dictionary_decode()
    if not pa.types.is_floating(part.type):
        # Too large for int64: negative, and refused like all numbers that are no labels.
        whole = part.cast(pa.int64(), safe=False).fill_null(UNLABELLED)
        return np.asarray(whole.to_numpy(zero_copy_only=False), np.int64)
    values = part.cast(pa.float64()).to_numpy(zero_copy_only=False)
    values = np.where(np.isnan(values), UNLABELLED, values)
    if (values != np.floor(values)).any():
        raise LabelError(f"holds fractions ({values[values != np.floor(values)][0]:g}, ...); expected classes")
    return np.clip(values, -(2.0**60), 2.0**60).astype(np.int64)


def _places(part: pa.Array, names: dict[str, int]) -> NDArray[np.int64]:
    if not pa.types.is_dictionary(part.type):
        part = part.cast(pa.large_string()).dictionary_encode()
    places = [
        UNLABELLED if name is None else names.setdefault(name, len(names)) for name in part.dictionary.to_pylist()
    ]
    if len(names) > MAX_LABEL + 1 or sum(map(len, names)) > _MAX_NAMES_BYTES:
        raise LabelError(f"holds {len(names):,} different texts or more; expected names of classes")
    indices = part.indices.cast(pa.int64()).fill_null(UNLABELLED).to_numpy(zero_copy_only=False)
    return np.array([*places, UNLABELLED], np.int64)[indices]  # UNLABELLED points to the last one
