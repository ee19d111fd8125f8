"""Count what the sources of a run hold: printed before a run, by `hvp-ray describe`, and stored in the run's summary."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.listing import LeftOut
from hvp_ray.data.source import Source
from hvp_ray.errors import HvpRayError
from hvp_ray.files import is_uri

_SHOWN = 6
_STARTS = {b"\xff\xd8\xff": (".jpg", "a JPEG"), b"\x89PNG\r\n\x1a\n": (".png", "a PNG")}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInventory:
    """Contents of one source, and what was left out."""

    location: str
    kind: str
    num_images: int
    num_classes: int | None
    """None: the source has no readable labels."""
    num_bytes: int
    """Size of all encoded images."""
    left_out: tuple[LeftOut, ...]

    def lines(self, title: str) -> list[str]:
        """Return a line on the contents, and one on what was left out, if anything."""
        classes = "no labels" if self.num_classes is None else _counted(self.num_classes, "classes")
        found = f"{self.kind}: {_counted(self.num_images, 'images')}, {classes}, {self.num_bytes / 1e6:,.1f} MB"
        lines = [f"{title:<9}{self.location}, {found}"]
        if self.left_out:
            more = len(self.left_out) - _SHOWN
            shown = [_describe(entry) for entry in self.left_out[:_SHOWN]]
            lines.append("left out " + "; ".join([*shown, f"and {more} more kinds"] if more > 0 else shown))
        return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInventory:
    """Contents of a run's sources."""

    source: SourceInventory
    num_training_images: int
    test_source: SourceInventory | None
    """None: test images are held out of the source."""
    num_test_images: int
    num_unused_images: int
    """Images of the source that `data.num_images` excludes."""

    def lines(self) -> list[str]:
        """Return two to five lines for the user."""
        use = f", {self.num_training_images:,} to train on"
        if self.test_source is None:
            use += f", {self.num_test_images:,} held out for evaluation"
        if self.num_unused_images:
            use += f", {self.num_unused_images:,} not used (data.num_images)"
        first, *rest = self.source.lines("data")
        test = [] if self.test_source is None else self.test_source.lines("test")
        return [first + use, *rest, *test]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with lists for tuples."""
        plain = lambda fields: {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
        return dataclasses.asdict(self, dict_factory=plain)


def take_inventory(dataset: Dataset, config: DataConfig) -> DataInventory:
    """Count images, classes and what is left out. Reads the labels.

    Args:
        dataset: opened.
        config: that opened it.
    """
    return DataInventory(
        source=inventory_of(dataset.source, config.source),
        num_training_images=len(dataset.training_ids),
        test_source=None if config.test_source is None else inventory_of(dataset.test_source, config.test_source),
        num_test_images=len(dataset.test_ids),
        num_unused_images=0 if config.num_images is None else dataset.source.num_samples - config.num_images,
    )


def inventory_of(source: Source, location: str) -> SourceInventory:
    """Count the contents of one source, and what is left out.

    Args:
        source: opened.
        location: its path or URI.
    """
    return SourceInventory(
        location=location,
        kind=source.kind,
        num_images=source.num_samples,
        num_classes=_count_classes(source),
        num_bytes=source.num_bytes,
        left_out=tuple(_with_note(entry, location) for entry in source.left_out),
    )


def _count_classes(source: Source) -> int | None:
    if not source.has_labels:
        return None
    try:
        labels = np.unique(source.load_labels())
    except HvpRayError:
        return None  # the evaluation reports the problem
    return int((labels >= 0).sum())


def _with_note(entry: LeftOut, location: str) -> LeftOut:
    """Add a note if a file was left out for its name although it starts like an image."""
    if is_uri(location) or not entry.is_by_name:
        return entry
    path = Path(location).expanduser() / entry.example
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            head = file.read(8)
    except OSError:
        return entry
    for start, (suffix, name) in _STARTS.items():
        if head.startswith(start):
            note = f"{name} by its first bytes; to have it read, rename it to end in {suffix}"
            return dataclasses.replace(entry, note=note)
    return entry


def _describe(entry: LeftOut) -> str:
    note = f": {entry.note}" if entry.note else ""
    return f"{_counted(entry.count, entry.reason)} (the first: {entry.example}{note})"


def _counted(count: int, what: str) -> str:
    if count == 1:
        for plural, singular in {"files": "file", "folders": "folder", "images": "image", "classes": "class"}.items():
            what = what.replace(plural, singular)
    return f"{count:,} {what}"
