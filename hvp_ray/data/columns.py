"""Find the columns of images, of paths and of labels in the schema of a table: Parquet, Arrow, CSV.

A column that an option names is taken. Otherwise its type and its name decide, and if several columns fit, the user chooses.
Columns are named by their path: `image`, or `sample.image` for a field of a struct.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hvp_ray.data.source import MAX_LABEL
from hvp_ray.errors import LabelError

_IMAGE_WORDS = frozenset(
    {"image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "tif", "tiff", "bytes", "content"}
)
_PATH_WORDS = frozenset({"path", "file", "filename", "filepath", "image", "img", "picture", "photo"})
_LABEL_WORDS = frozenset({"label", "labels", "class", "classes", "cls", "target", "category"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SHOWN = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnNames:
    """The columns that the options name. None: they are found."""

    image: str | None
    label: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table, or why there is none."""

    path: str = ""
    problem: str = ""
    """End of a sentence about the file. Empty: the column was found."""
    is_ambiguous: bool = False
    """Whether several columns may be the one."""


def find_images(schema: pa.Schema, wanted: str | None) -> Column:
    """Find the column of encoded images: a struct with a binary field `bytes` (Hugging Face's images), or binary values."""
    return _find(
        schema,
        wanted,
        first="image",
        groups=[
            [path for path, kind in _columns(schema) if has_bytes(kind)],
            [path for path, kind in _columns(schema) if is_binary(kind) and _is_called(path, _IMAGE_WORDS)],
        ],
        fits=lambda kind: has_bytes(kind) or is_binary(kind),
        expected="struct<bytes: binary, path: string> or binary",
        what="images",
        option="--data.image_column",
    )


def find_paths(schema: pa.Schema, wanted: str | None) -> Column:
    """Find the column of an image list that has the paths of the files."""
    return _find(
        schema,
        wanted,
        first="path",
        groups=[[path for path, kind in _columns(schema) if is_text(kind) and _is_called(path, _PATH_WORDS)]],
        fits=is_text,
        expected="paths of images",
        what="paths",
        option="--data.image_column",
    )


def find_labels(schema: pa.Schema, wanted: str | None) -> Column:
    """Find the column of labels: the one called `label`, else the only `ClassLabel`, else the only one called like labels."""
    return _find(
        schema,
        wanted,
        first="label",
        groups=[
            [path for path, _ in _columns(schema) if listed_names(schema, path)],
            [path for path, kind in _columns(schema) if _holds_labels(kind) and _is_called(path, _LABEL_WORDS)],
        ],
        fits=_holds_labels,
        expected="integers, strings, categories, booleans, or floats without a fraction",
        what="labels",
        option="--data.label_column",
    )


def choose_label(names: Sequence[str], prefix: str) -> str | None:
    """Return the name of the label among the names of single values, by the rule of `find_labels`; None: there is none.

    Raises:
        LabelError: several may be the label.
    """
    candidates = [name for name in names if _is_called(name, _LABEL_WORDS)]
    if len(candidates) > 1 and "label" not in candidates:
        options = [f"{prefix}{name}" for name in candidates[:_SHOWN]]
        raise LabelError(f"{len(candidates)} values may be the label; choose one by --data.label_column: {options}")
    return "label" if "label" in candidates else next(iter(candidates), None)


def bytes_path(schema: pa.Schema, column: str) -> str:
    """Return the path of the bytes of images, for a column of `find_images`."""
    return column if is_binary(dict(_columns(schema))[column]) else f"{column}.bytes"


def listed_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Return the names that Hugging Face keeps for the integers of a column (`ClassLabel`). Empty: it keeps none."""
    try:
        feature: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for part in column.split("."):
            feature = feature[part]
        names = feature["names"] if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    is_list = isinstance(names, list) and len(names) <= MAX_LABEL + 1 and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()


def is_binary(kind: pa.DataType) -> bool:
    """Tell whether values of a type are bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def has_bytes(kind: pa.DataType) -> bool:
    """Tell whether a type is that of Hugging Face's images: a struct with one field `bytes`."""
    if not pa.types.is_struct(kind) or [field.name for field in kind].count("bytes") != 1:
        return False
    return is_binary(kind.field("bytes").type)


def is_number(kind: pa.DataType) -> bool:
    """Tell whether values of a type are numbers, or categories of numbers."""
    if pa.types.is_dictionary(kind):
        return is_number(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind))


def is_text(kind: pa.DataType) -> bool:
    """Tell whether values of a type are strings, or categories of strings."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _find(
    schema: pa.Schema,
    wanted: str | None,
    *,
    first: str,
    groups: Sequence[list[str]],
    fits: Any,
    expected: str,
    what: str,
    option: str,
) -> Column:
    """Return the wanted column, or `first`, or the only one of the first group that has any."""
    found = list(_columns(schema))
    paths = [path for path, _ in found]
    shown = f"{schema.names[:_SHOWN]}{' and more' if len(schema.names) > _SHOWN else ''}"
    choose = f"Name the column of {what} by {option}"
    candidates = next((group for group in groups if group), [])
    name = wanted or (first if first in paths and (fits(dict(found)[first]) or not candidates) else None)
    if name is not None:
        if (count := paths.count(name)) != 1:
            return Column(problem=f" has {count or 'no'} column{'s' * (count > 1)} {name!r}; it has {shown}. {choose}")
        kind = dict(found)[name]
        if pa.types.is_null(kind):
            return Column(problem=f": column {name!r} is empty. {choose}")
        if not fits(kind):
            return Column(problem=f": column {name!r} has type {str(kind)[:200]}; expected {expected}. {choose}")
        return Column(path=name)
    if len(candidates) == 1:
        return Column(path=candidates[0])
    if candidates:
        some = f"has {len(candidates)} columns that may hold {what}: {candidates[:_SHOWN]}"
        return Column(problem=f" {some}. Choose one by {option}", is_ambiguous=True)
    return Column(problem=f" has no column of {what}; it has {shown}. {choose}")


def _columns(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Yield path and type of every column, and of the fields of structs that are no images."""
    pending = [(field.name, field.type) for field in schema]
    while pending:
        path, kind = pending.pop(0)
        yield path, kind
        if pa.types.is_struct(kind) and not has_bytes(kind):
            pending += [(f"{path}.{field.name}", field.type) for field in kind]


def _holds_labels(kind: pa.DataType) -> bool:
    return is_number(kind) or is_text(kind)


def _is_called(path: str, words: frozenset[str]) -> bool:
    """Tell whether the last part of a path has one of the words: `imgBytes`, `image_data`, `fine-label`."""
    return not words.isdisjoint(word.lower() for word in _WORD.findall(path.rpartition(".")[2]))
