"""Labels in Parquet files: which columns can hold them, and what their values mean.

Integers, booleans and floats without a fraction are numbers. Strings and categories are names, and so are the integers of a
`datasets.ClassLabel`, whose names Hugging Face stores in the schema's metadata. `parquet.py` reads the columns.
"""

import itertools
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvp_ray.data.source import MAX_LABEL, UNLABELLED, renumber
from hvp_ray.errors import LabelError

_MAX_NAMES_BYTES = 64 * 2**20
"""Bound on all distinct names of a file. A column with more holds texts, not classes."""


def label_problem(schema: pa.Schema, column: str) -> str:
    """Return why a file has no labels, as the end of a sentence about it. Empty: it has."""
    if schema.names.count(column) != 1:
        return f"{missing_column(schema, column)}. Name the column of labels by --data.label_column"
    kind = schema.field(column).type
    if pa.types.is_null(kind):
        return f": column {column!r} is empty"
    if not _is_number(kind) and not _is_text(kind):
        return (
            f": column {column!r} has type {str(kind)[:200]}; expected integers, strings, categories, booleans, or floats "
            f"without a fraction. Name another column by --data.label_column"
        )
    return ""


def missing_column(schema: pa.Schema, column: str) -> str:
    """Describe that a file has no column of this name, or several, as a part of a sentence about it."""
    count = schema.names.count(column)
    shown = f"{schema.names[:20]}{' and more' if len(schema.names) > 20 else ''}"
    return f" has {count or 'no'} column{'s' * (count > 1)} {column!r}; it has {shown}"


def read_numbers(part: pa.Array, names: dict[str, int], shown: str) -> NDArray[np.int64]:
    """Return labels: the numbers of a part of a column, or places in `names`, to which new names are added.

    Args:
        part: part of a column without `label_problem`.
        names: name -> label; stays empty if the column holds numbers.
        shown: file and column, for messages.

    Raises:
        LabelError: the column holds no classes.
    """
    return _numbers(part, shown) if _is_number(part.type) else _places(part, names, shown)


def listed_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Return the names that Hugging Face keeps for the integers of a column (`ClassLabel`). Empty: it keeps none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"] if features[column]["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    is_list = isinstance(names, list) and len(names) <= MAX_LABEL + 1 and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()


def merge_names(
    labels: NDArray[np.int64], starts: Sequence[int], names: Sequence[tuple[str, ...]], *, are_listed: bool
) -> tuple[str, ...]:
    """Renumber the labels of all files in one numbering, in place; return the class names.

    Equal lists stay as they are. Other names are merged and sorted.

    Args:
        labels: [N], of all files: numbers if no file has names, else indices into the names of its file.
        starts: first label of each file, and N.
        names: class names of each file.
        are_listed: all names come from `listed_names`, so their order matters.

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
        part[:] = renumber(part, (index[name] for name in own))
    return merged


def _is_number(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_number(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _numbers(part: pa.Array, shown: str) -> NDArray[np.int64]:
    if pa.types.is_dictionary(part.type):
        part = part.dictionary_decode()
    if not pa.types.is_floating(part.type):
        # A number too large for int64 becomes negative, and is refused as no label.
        whole = part.cast(pa.int64(), safe=False).fill_null(UNLABELLED)
        return np.asarray(whole.to_numpy(zero_copy_only=False), np.int64)
    values = part.cast(pa.float64()).to_numpy(zero_copy_only=False)
    values = np.where(np.isnan(values), UNLABELLED, values)
    if (values != np.floor(values)).any():
        raise LabelError(f"{shown} holds fractions ({values[values != np.floor(values)][0]:g}, ...); expected classes")
    return np.clip(values, -(2.0**60), 2.0**60).astype(np.int64)


def _places(part: pa.Array, names: dict[str, int], shown: str) -> NDArray[np.int64]:
    if not pa.types.is_dictionary(part.type):
        part = part.cast(pa.large_string()).dictionary_encode()
    places = [
        UNLABELLED if name is None else names.setdefault(name, len(names)) for name in part.dictionary.to_pylist()
    ]
    if len(names) > MAX_LABEL + 1 or sum(map(len, names)) > _MAX_NAMES_BYTES:
        raise LabelError(f"{shown} holds {len(names):,} different texts or more; expected names of classes")
    indices = part.indices.cast(pa.int64()).fill_null(UNLABELLED).to_numpy(zero_copy_only=False)
    return renumber(indices, places)
