"""Ranges, written beside the fields that they limit, and the one checker of a config.

A field states its range in its type: `epochs: AtLeast1`, `crop_scale: Annotated[tuple[float, float], Limits(above=0)]`.
Every section derives from `Checked` and is checked when it is made. A `RunConfig` checks all of its sections again, with
the full path of each field. Only conditions across fields are code (`Checked.check_together`).
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from hvp_ray.credentials import refuse_credentials
from hvp_ray.errors import ConfigError

_conditions_are_left_out: ContextVar[bool] = ContextVar("_conditions_are_left_out", default=False)
_checks_are_deferred: ContextVar[bool] = ContextVar("_checks_are_deferred", default=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Allowed numbers: from `least` or above `above`, to `most` or below `below`. None: no limit on this side."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def allows(self, value: Any) -> bool:
        """Return whether a number is in the range. NaN is in no range."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Describe the range, for instance `1 or more`."""
        least, above, most, below = (
            f"{end:g}" if isinstance(end, float) else end for end in (self.least, self.above, self.most, self.below)
        )
        if least is not None and most is not None:
            return f"{least} to {most}"
        ends = {f"{least} or more": least, f"above {above}": above, f"at most {most}": most, f"below {below}": below}
        return " and ".join(text for text, end in ends.items() if end is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits(Range):
    """Allowed pairs (minimum, maximum), both numbers of a range."""

    def allows(self, value: Any) -> bool:
        """Return whether both numbers are in the range and in order."""
        low, high = value
        return bool(low <= high) and Range.allows(self, low) and Range.allows(self, high)

    def __str__(self) -> str:
        """Describe the pair, for instance `min <= max, both 0 to 1`."""
        return f"min <= max, both {Range.__str__(self)}"


@dataclass(frozen=True, slots=True)
class Location:
    """Allowed paths and URIs: not empty."""

    meaning: str = "a path or a URI"

    def allows(self, value: str) -> bool:
        """Return whether there is a path."""
        return bool(value)

    def __str__(self) -> str:
        """Return the meaning of the text, for messages."""
        return self.meaning


AtLeast0 = Annotated[int, Range(least=0)]
AtLeast1 = Annotated[int, Range(least=1)]
NonNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
"""A share or a probability."""
PathOrUri = Annotated[str, Location()]


class Checked:
    """Base of all sections of a config."""

    __slots__ = ()

    path: ClassVar[str] = ""
    """Name of the section in a `RunConfig`. Empty: the section occurs in several places."""

    def __post_init__(self) -> None:
        """Check this section, unless its checks are deferred."""
        if not _checks_are_deferred.get():
            check(self, f"{self.path or type(self).__name__}.")

    def check_together(self, prefix: str) -> None:
        """Check conditions across fields.

        Args:
            prefix: prefix of the field names in messages, for instance `views.`.

        Raises:
            ConfigError: a condition does not hold; see `require`.
        """


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Leave all checks to the `RunConfig` that is made in this context.

    A parser makes the innermost values first. Checked at once, they could not name their full path.
    """
    token = _checks_are_deferred.set(True)
    try:
        yield
    finally:
        _checks_are_deferred.reset(token)


@contextmanager
def conditions_left_out() -> Iterator[None]:
    """Check single fields only: a recipe that adapts itself has yet to choose what must fit the settings that are given."""
    token = _conditions_are_left_out.set(True)
    try:
        yield
    finally:
        _conditions_are_left_out.reset(token)


def check(section: Checked, prefix: str) -> None:
    """Check a section and the sections in it. No text of a config may be a URI with credentials.

    Args:
        section: a frozen dataclass.
        prefix: prefix of its field names in messages, for instance `views.`.

    Raises:
        ConfigError: a value does not fit its field, or carries credentials.
    """
    for name, hint in hints_of(type(section)).items():
        value, path = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, Checked) and _fits(hint, value):
            check(value, f"{path}.")
            continue
        if isinstance(value, str):
            refuse_credentials(path, value)
        require(_fits(hint, value), path, value, describe(hint))
    if not _conditions_are_left_out.get():
        section.check_together(prefix)


def require(condition: bool, path: str, value: object, allowed: str) -> None:  # noqa: FBT001 (reads as an assertion)
    """Raise unless the condition holds.

    Raises:
        ConfigError: the message has the path of the field, its value and what is allowed.
    """
    if not condition:
        raise ConfigError(f"{path}={value!r} is not allowed: {allowed}")


def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Return the types of the fields of a dataclass by name, with their ranges."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def describe(hint: Any) -> str:
    """Describe what a field of this type allows, for instance `1 or more, or None`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return ", ".join(map(str, _rules(hint))) or describe(arguments[0])
    if origin in (Union, UnionType):
        return ", or ".join(map(describe, sorted(arguments, key=lambda member: member is NoneType)))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        number = "values" if arguments[-1] is ... else f"{len(arguments)} values"
        return f"{number}, each {describe(arguments[0])}"
    return "None" if hint is NoneType else getattr(hint, "__name__", str(hint))


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value has a type and is in its range. Types that this cannot judge accept any value."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return _fits(arguments[0], value) and all(rule.allows(value) for rule in _rules(hint))
    if origin in (Union, UnionType):
        return any(_fits(member, value) for member in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple and arguments and isinstance(value, tuple):
        members = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(members) == len(value) and all(map(_fits, members, value))
    if origin in (int, float):
        return isinstance(value, int | origin) and not isinstance(value, bool)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _rules(hint: Any) -> list[Range | Location]:
    """Return the ranges of an `Annotated` type, without the annotations for other libraries (tyro, beartype)."""
    return [part for part in hint.__metadata__ if isinstance(part, Range | Location)]
