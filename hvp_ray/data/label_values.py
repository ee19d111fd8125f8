"""What the values of a column of labels mean (`columns.py` finds the column).

Integers, booleans and floats without a fraction are numbers. Strings and categories are names, and so are the integers of a
`datasets.ClassLabel`, whose names Hugging Face stores in the schema's metadata. Every source of a table reads labels here.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hvp_ray.data.columns import is_number
from hvp_ray.data.source import MAX_LABEL, UNLABELLED, renumber
from hvp_ray.errors import LabelError

_MAX_NAMES_BYTES = 64 * 2**20
"""Bound on all distinct names of a file. A column with more holds texts, not classes."""


def read_numbers(part: pa.Array, names: dict[str, int], shown: str) -> NDArray[np.int64]:
    """Return labels: the numbers of a part of a column, or places in `names`, to which new names are added.

    Args:
        part: part of a column of `find_labels`.
        names: name -> label; stays empty if the column holds numbers.
        shown: file and column, for messages.

    Raises:
        LabelError: the column holds no classes.
    """
    return _numbers(part, shown) if is_number(part.type) else _places(part, names, shown)


def labels_of(
    parts: Sequence[pa.Array], listed: tuple[str, ...], shown: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the labels of a whole column, [N], and the names of the classes.

    Args:
        parts: the column.
        listed: names that its schema lists for numbers (`columns.listed_names`).
        shown: file and column, for messages.

    Raises:
        LabelError: the column holds no classes.
    """
    found: dict[str, int] = {}
    labels = np.concatenate([np.zeros(0, np.int64), *(read_numbers(part, found, shown) for part in parts)])
    check_range(labels, () if found else listed, shown, "Name another column by --data.label_column")
    names = tuple(found) or listed
    return labels, merge_names(labels, [0, len(labels)], [names], are_listed=not found and bool(listed))


def check_range(labels: NDArray[np.int64], names: tuple[str, ...], shown: str, advice: str) -> None:
    """Check that numbers are classes.

    Args:
        labels: numbers of a file.
        names: names that the file lists for them. Empty: it lists none.
        shown: file and column, for messages.
        advice: last sentence of the message.

    Raises:
        LabelError: a number is below -1, or has no name, or is too large.
    """
    largest = len(names) - 1 if names else MAX_LABEL
    if len(labels) and (labels.min() < UNLABELLED or labels.max() > largest):
        raise LabelError(
            f"{shown} has values from {labels.min()} to {labels.max()}; expected classes from 0 to {largest}, or "
            f"{UNLABELLED} for none. {advice}"
        )


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
