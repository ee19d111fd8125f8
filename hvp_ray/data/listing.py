"""List the files below a folder of this machine, and count what is left out and why.

Every source uses this listing, so a fingerprint, an inventory and a second run see the same files.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvp_ray.errors import DataError

NO_FILE = "broken links, loops, pipes or devices"
HIDDEN = "hidden"
OF_RUNS = "entries that hvp_ray wrote"
MLFLOW_ARTIFACTS = "mlflow-artifacts"
"""Folder of figures and encoders of runs in MLflow's default store."""

_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}$")
_MLFLOW_STORE = "mlflow.db"
_MAX_SUFFIXES = 256
_FILES = " files"
_WITHOUT_SUFFIX = "files without a suffix"
MAX_MARK_BYTES = 4 * 2**20
_MARKS = {"config.json": "run_identity", "comparison.json": "costs"}
"""File name -> a key in this file, which marks the folder of a run or of a comparison."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Entries of a source that are not read, for one reason."""

    reason: str
    count: int
    example: str
    """The first entry, relative to the source."""
    note: str = ""
    """A remark on the first entry."""

    @property
    def is_by_name(self) -> bool:
        """Whether the entries are files that were left out only because of their names."""
        return self.reason == _WITHOUT_SUFFIX or self.reason.endswith(_FILES)


class Leftovers:
    """Counts of what a listing leaves out, with one example each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}
        self._suffixes: set[str] = set()

    def copy(self) -> "Leftovers":
        """Return a copy."""
        other = Leftovers()
        other._found, other._suffixes = dict(self._found), set(self._suffixes)
        return other

    def add(self, reason: str, path: str) -> None:
        """Count an entry."""
        count, example = self._found.get(reason, (0, path))
        self._found[reason] = count + 1, min(example, path)

    def add_entry(self, entry: LeftOut) -> None:
        """Count what another listing left out."""
        count, example = self._found.get(entry.reason, (0, entry.example))
        self._found[entry.reason] = count + entry.count, min(example, entry.example)

    def add_file(self, path: str) -> None:
        """Count a file of a kind that is not read here, by its suffix."""
        suffix = suffix_of(path)
        if suffix not in self._suffixes and len(self._suffixes) >= _MAX_SUFFIXES:
            suffix = ""
        self._suffixes.add(suffix)
        self.add(f"{suffix}{_FILES}" if suffix else _WITHOUT_SUFFIX, path)

    def has_suffix(self, suffixes: tuple[str, ...]) -> bool:
        """Tell whether a file with one of these endings was left out."""
        return not self._suffixes.isdisjoint(suffixes)

    def count(self, reason: str) -> int:
        """Return the number of entries left out for a reason."""
        return self._found.get(reason, (0, ""))[0]

    @property
    def num_files(self) -> int:
        """Number of files of other kinds."""
        return sum(entry.count for entry in self.entries() if entry.is_by_name)

    def entries(self) -> tuple[LeftOut, ...]:
        """Return what was left out, the largest count first."""
        ordered = sorted(self._found.items(), key=lambda found: (-found[1][0], found[0]))
        return tuple(LeftOut(reason=reason, count=count, example=name) for reason, (count, name) in ordered)


def suffix_of(path: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; empty: there is none of at most 8 characters."""
    found = _SUFFIX.search(path.rpartition("/")[2].lower())
    return found[0] if found else ""


def hidden_part(name: str) -> str:
    """Return the hidden file or folder on the way to `name`, which is relative to the source. Empty: there is none."""
    parts = name.split("/")
    return next(("/".join(parts[: depth + 1]) for depth, part in enumerate(parts) if part.startswith(".")), "")


def walk_files(root: str, leftovers: Leftovers, *, recursive: bool = True) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield (path relative to `root`, entry) of every file.

    Leaves out hidden files and folders, and what hvp_ray wrote, unless it is `root`. Follows links, also out of the root, but
    lists each folder once and never one that contains the root. Opens only the JSON files of runs and stats no file.

    Args:
        root: a folder.
        leftovers: counts what is left out here. The caller adds the files that it rejects.
        recursive: also the files in folders of the folder.

    Raises:
        DataError: a folder cannot be read.
    """
    seen: set[str] = set()
    real_root = os.path.realpath(root)
    pending = [""]
    while pending:
        relative = pending.pop()
        real = os.path.realpath(os.path.join(root, relative))
        if real in seen:
            continue
        seen.add(real)
        if relative and os.path.commonpath([real, real_root]) == real:
            leftovers.add(NO_FILE, relative)
            continue
        try:
            entries = list(os.scandir(os.path.join(root, relative)))
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}; give read permission") from error
        if relative and is_written_by_runs(real, [entry.name for entry in entries]):
            leftovers.add(OF_RUNS, relative)
            continue
        folders: list[str] = []
        for entry in entries:
            path = os.path.join(relative, entry.name)
            if entry.name.removeprefix(".").startswith(_MLFLOW_STORE):
                leftovers.add(OF_RUNS, path)
                continue
            if entry.name.startswith("."):
                leftovers.add(HIDDEN, path)
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, or to a forbidden folder
                is_folder = is_file = False
            if is_folder:
                folders.append(path)
            elif is_file:
                yield path, entry
            else:
                leftovers.add(NO_FILE, path)
        # Sorted, so that of two links to one folder the same one counts on every machine.
        pending += sorted(folders, reverse=True) if recursive else []


def is_written_by_runs(folder: str, names: list[str]) -> bool:
    """Tell whether a folder belongs to a run, a comparison or MLflow's artifacts.

    Args:
        folder: its path.
        names: names of its entries.
    """
    if os.path.basename(folder) == MLFLOW_ARTIFACTS:
        return True
    return any(name in names and is_mark(name, _read(Path(folder, name))) for name in _MARKS)


def is_mark(name: str, content: bytes) -> bool:
    """Tell whether hvp_ray wrote a file named `config.json` or `comparison.json`."""
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return isinstance(found, dict) and _MARKS[name] in found


def _read(path: Path) -> bytes:
    try:
        if path.is_file() and path.stat().st_size <= MAX_MARK_BYTES:
            return path.read_bytes()
    except OSError:
        pass
    return b""
