"""The folder of a run that lives on a bucket, and each rank's working copy of it on the local disk.

A rank reads and writes files in its working copy as if it were the run's folder. Checkpoints alone go straight to the bucket
(`checkpoint.py`) and are never here. Three promises:

- What a checkpoint presupposes (the journals up to its step, the decisions of every rank on unreadable images) is on the
  bucket before its manifest is. `train_rank` pushes before each commit.
- The bucket is the truth. Opening empties the working copy and pulls, so nothing that an earlier attempt left counts.
- An attempt may die between any two uploads: what is pulled then is what was there after the last one.

Journals (`*.jsonl`) only ever grow, and lose their end when a run is resumed. They are uploaded in parts, each byte once:
`metrics.jsonl/part-<attempt>-<upload>-<first byte>` says "cut the journal at this byte, then append this"; read in the order
of their names (`replay_parts`), parts give the journal as it was at the last upload. At the end of a run one part with all of
it takes their place. All other files are uploaded as a whole where they changed.
"""

import dataclasses
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from urllib.parse import urlsplit

from hvp_ray.config import RunConfig
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.files import Folder, is_uri, join_uri, read_file

logger = logging.getLogger(__name__)

JOURNAL_SUFFIX = ".jsonl"
DECISIONS = "unreadable-rank-"
"""Journals of the ranks' decisions on unreadable images begin so; each rank pushes its own, rank 0 everything else."""

BACKBONE = "backbone.safetensors"
_LAST = "summary.json"
_NOT_MIRRORED = ("checkpoints/", "ray_train/")
_PART = re.compile(r"part-(\d{6})-(\d{6})-(\d{12})")
_REQUESTS_AT_ONCE = 8
_BLOCK_BYTES = 2**20
_LOCK_PATIENCE_SECONDS = 60.0

_State = tuple[int, int, int]
"""Inode, time of the last change in ns, size in bytes: other values, other content."""


class RunStorage:
    """A run's folder as one rank has it; a context manager. Where the run's folder is a path, there is nothing to do."""

    def __init__(self, run_dir: Path, run_uri: str | None, *, rank: int) -> None:
        """Take the working copy for this process, and fill it from the bucket.

        Args:
            run_dir: the run's folder where `run_uri` is None.
            run_uri: the run's folder on a bucket.
            rank: of this process.

        Raises:
            ConfigError: the bucket or the local disk cannot be used, or another process works on the run.
            CheckpointError: the bucket failed while it was read.
        """
        self.folder = run_dir
        """Where this rank reads and writes the run's files."""
        self._rank = rank
        self._remote: Folder | None = None
        if run_uri is None:
            return
        self._remote = Folder(run_uri)
        self.folder = working_folder(run_uri) / f"rank-{rank}"
        self._journals: dict[str, _PushedJournal] = {}
        self._pushed: dict[str, _State] = {}
        self._attempt = 1
        self._busy = threading.Lock()
        self._claim = _claim(self.folder)
        try:
            self._pull(wanted=lambda name: self._is_ours(name) or name.startswith(DECISIONS))
        except BaseException:
            self._claim.close()
            raise

    def push(self, *, is_final: bool = False) -> None:
        """Upload what is new in this rank's files, the summary last, then delete what is no longer there.

        Args:
            is_final: the run has ended: each journal becomes one part.

        Raises:
            CheckpointError: the bucket refused, also when asked again.
        """
        if self._remote is None:
            return
        with self._busy:
            try:
                self._push(self._remote, is_final=is_final)
            except OSError as error:
                raise self._failure("written", error) from error

    def push_file(self, name: str) -> None:
        """Upload one file as a whole, if it changed; for other threads than that of training.

        Raises:
            CheckpointError: see `push`.
        """
        if self._remote is None:
            return
        with self._busy:
            try:
                self._push_whole(self._remote, name)
            except OSError as error:
                raise self._failure("written", error) from error

    def pull_decisions(self) -> None:
        """Bring the other ranks' decisions on unreadable images here, as they pushed them.

        Raises:
            CheckpointError: the bucket failed.
        """
        if self._remote is not None:
            self._pull(wanted=lambda name: name.startswith(DECISIONS) and not self._is_ours(name))

    def __enter__(self) -> "RunStorage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Delete the working copy, unless something failed: then it stays until the next attempt on this machine."""
        if self._remote is None:
            return
        for journal in self._journals.values():
            journal.close()
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._claim.close()

    def _is_ours(self, name: str) -> bool:
        if name.startswith(DECISIONS):
            return name.partition("/")[0] == f"{DECISIONS}{self._rank}{JOURNAL_SUFFIX}"
        return self._rank == 0

    def _pull(self, wanted: Callable[[str], bool]) -> None:
        assert self._remote is not None
        try:
            names = [name for name in self._remote.names() if not name.startswith(_NOT_MIRRORED) and wanted(name)]
            journals = _parts_by_journal(names)
            whole = [name for name in names if not name.partition("/")[0].endswith(JOURNAL_SUFFIX)]
            with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
                for name, content in zip(whole, pool.map(self._remote.read, whole), strict=True):
                    if content is not None:  # else it was deleted since it was listed
                        path = self.folder / name
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(content)
                        if self._is_ours(name):
                            self._pushed[name] = _state(path)
                numbers = [
                    _numbers(part)[0] for name, parts in journals.items() if self._is_ours(name) for part in parts
                ]
                self._attempt = max([self._attempt, *(number + 1 for number in numbers)])
                for name, parts in journals.items():
                    contents = pool.map(self._remote.read, [f"{name}/{part}" for part in parts])
                    self._take_journal(name, list(zip(parts, contents, strict=True)))
        except OSError as error:
            raise self._failure("read", error) from error

    def _take_journal(self, name: str, parts: list[tuple[str, bytes | None]]) -> None:
        path = self.folder / name
        present = [(part, content) for part, content in parts if content is not None]
        content = replay_parts(present, journal=name)
        path.write_bytes(content)
        if self._is_ours(name):
            journal = _PushedJournal()
            journal.parts += [part for part, _ in parts]
            journal.note_pushed(path, len(content))
            self._journals[name] = journal

    def _push(self, remote: Folder, *, is_final: bool) -> None:
        here = self._own_files()
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            uploads = [
                pool.submit(self._push_journal, remote, name, is_final=is_final)
                if name.endswith(JOURNAL_SUFFIX)
                else pool.submit(self._push_whole, remote, name)
                for name in here
                if name != _LAST
            ]
        for upload in uploads:
            upload.result()
        if _LAST in here:
            self._push_whole(remote, _LAST)
        for name in set(self._pushed) - set(here):
            remote.delete(name)
            del self._pushed[name]

    def _own_files(self) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".part")
        names = (path.relative_to(self.folder).as_posix() for path in files)
        return sorted(name for name in names if self._is_ours(name))

    def _push_whole(self, remote: Folder, name: str) -> None:
        path = self.folder / name
        state = _state(path)
        if self._pushed.get(name) != state:
            remote.write(name, path.read_bytes())
            self._pushed[name] = state

    def _push_journal(self, remote: Folder, name: str, *, is_final: bool) -> None:
        path = self.folder / name
        journal = self._journals.setdefault(name, _PushedJournal())
        start, obsolete = journal.first_new_byte(path), list(journal.parts)
        is_there = start == journal.num_bytes == path.stat().st_size
        if is_there and not (is_final and len(obsolete) > 1):
            return
        if is_final:
            start = 0
        with path.open("rb") as file:
            file.seek(start)
            content = file.read()
        remote.write(f"{name}/{journal.next_part(self._attempt, start)}", content)
        journal.note_pushed(path, start + len(content))
        if is_final:
            for part in obsolete:
                remote.delete(f"{name}/{part}")
                journal.parts.remove(part)

    def _failure(self, done: str, error: OSError) -> CheckpointError:
        assert self._remote is not None
        return CheckpointError(
            f"the run's folder {self._remote.location} could not be {done}: {error}; the checkpoints in it are untouched, and "
            f"what is not there yet lies in {self.folder}. Mend the storage, then start the run again with its name to go on"
        )


class _PushedJournal:
    """How far one journal is on the bucket, and under which names."""

    def __init__(self) -> None:
        self.num_bytes = 0
        """So many bytes of `_file` are on the bucket."""
        self.parts: list[str] = []
        """Names that are there, or may be."""
        self._num_uploads = 0
        # The file that was pushed, held open: a journal that was cut is another file under the same name.
        self._file: BinaryIO | None = None

    def first_new_byte(self, path: Path) -> int:
        """Return from where on the journal differs from what is on the bucket."""
        if self._file is None:
            return 0
        if os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
            return min(self.num_bytes, path.stat().st_size)
        with path.open("rb") as now:
            self._file.seek(0)
            return _common_prefix(self._file, now, self.num_bytes)

    def next_part(self, attempt: int, start: int) -> str:
        """Return the name of the next upload, never one that was given out before: what failed may yet have arrived."""
        self._num_uploads += 1
        part = f"part-{attempt:06d}-{self._num_uploads:06d}-{start:012d}"
        self.parts.append(part)
        return part

    def note_pushed(self, path: Path, num_bytes: int) -> None:
        """Note that the first bytes of the journal are on the bucket."""
        self.close()
        self._file = path.open("rb")
        self.num_bytes = num_bytes

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()


def replay_parts(parts: Iterable[tuple[str, bytes]], *, journal: str) -> bytes:
    """Return the content of a journal: each part, in the order of the names, cuts it at its first byte and appends.

    An attempt at the run that is not quite dead does no harm: its parts come before those of the next attempt, and only
    lengthen what that one has cut.
    """
    content = bytearray()
    for name, appended in sorted(parts, key=lambda part: _numbers(part[0])):
        start = _numbers(name)[2]
        if start > len(content):
            logger.warning("%s: bytes %d to %d are missing; %s is left out", journal, len(content), start, name)
            continue
        content[start:] = appended
    return bytes(content)


def working_folder(uri: str) -> Path:
    """Return the folder on this machine that belongs to a run's URI, in the user's cache (XDG_CACHE_HOME, ~/.cache).

    Raises:
        ConfigError: this account has no home folder.
    """
    return _cache() / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16] / (_run_name(uri) or "run")


def fetch_run(uri: str, *, files: tuple[str, ...] = (), folders: tuple[str, ...] = (), option: str) -> Path:
    """Bring files of a run to this machine; return the folder that has them.

    Args:
        uri: the run's folder on a bucket.
        files: names; one that is missing there is missing here.
        folders: names; as they are there, nothing older.
        option: what the URI was given by, for messages.

    Raises:
        ConfigError: the URI cannot be used, or the local disk.
        CheckpointError: there is no such run, or the bucket failed.
    """
    remote, target = Folder(uri, option=option), working_folder(uri) / "copy"
    try:
        if remote.read("config.json") is None:
            raise CheckpointError(f"{option}={uri!r}: there is no run ({join_uri(uri, 'config.json')} is missing)")
        inside = {folder: remote.names(folder) for folder in folders}
        names = [*files, *(name for found in inside.values() for name in found)]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            contents = dict(zip(names, pool.map(remote.read, names), strict=True))
    except OSError as error:
        raise CheckpointError(f"{option}={uri!r} cannot be read: {error}") from error
    try:
        for folder in folders:
            shutil.rmtree(target / folder, ignore_errors=True)
        for name, content in contents.items():
            if content is None:
                (target / name).unlink(missing_ok=True)
            else:
                _write(target / name, content)
    except OSError as error:
        raise _no_local_disk(target, error) from error
    return target


@functools.cache
def local_weights(location: str) -> str:
    """Return where initial weights lie on this machine; those behind a URI are downloaded, once for each process.

    Args:
        location: `training.initial_weights`: a run's folder or a safetensors file, path or URI.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: the URI cannot be used, or the local disk.
    """
    if not is_uri(location):
        return location
    option = "training.initial_weights"
    uri = location if urlsplit(location).path.endswith(".safetensors") else join_uri(location, BACKBONE)
    try:
        content = read_file(uri, option=option)
    except OSError as error:
        raise CheckpointError(f"{option}={location!r} cannot be read: {error}") from error
    if content is None:
        raise CheckpointError(f"{option}={location!r}: there is no file {uri}")
    path = _cache() / "weights" / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    try:
        if not path.is_file():
            _write(path, content)
    except OSError as error:
        raise _no_local_disk(path.parent, error) from error
    return str(path)


def with_local_weights(config: RunConfig) -> RunConfig:
    """Return the config with `training.initial_weights` as a path on this machine; see `local_weights`."""
    weights = config.training.initial_weights
    if weights is None:
        return config
    training = dataclasses.replace(config.training, initial_weights=local_weights(weights))
    return dataclasses.replace(config, training=training)


def _cache() -> Path:
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(f"{error}; name a folder for working copies of runs by XDG_CACHE_HOME") from error
    return Path(root).absolute() / "hvp_ray"


def _run_name(uri: str) -> str:
    return uri.partition("?")[0].rstrip("/").rpartition("/")[2]


def _claim(folder: Path) -> BinaryIO:
    """Lock and empty a working copy; return what holds the lock until it is closed.

    Raises:
        ConfigError: another process keeps it, or the disk cannot be used.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("ab")
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS  # an attempt that was killed may take a while to go
        while not _lock(lock):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another process of this machine works on the same run ({lock.name} is locked); wait for its end, or "
                    f"take another run.name"
                )
            time.sleep(0.2)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        raise _no_local_disk(folder, error) from error
    return lock


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _no_local_disk(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the working copy {folder} of the run cannot be written: {error.strerror or error}; name another folder by the "
        f"environment variable XDG_CACHE_HOME"
    )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _parts_by_journal(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the parts of each journal, in order."""
    journals: dict[str, list[str]] = {}
    for name in names:
        journal, _, part = name.partition("/")
        if journal.endswith(JOURNAL_SUFFIX) and _PART.fullmatch(part):
            journals.setdefault(journal, []).append(part)
    return {journal: sorted(parts, key=_numbers) for journal, parts in journals.items()}


def _numbers(part: str) -> tuple[int, int, int]:
    """Return attempt, upload and first byte of a part."""
    match = _PART.fullmatch(part)
    assert match is not None
    attempt, upload, start = map(int, match.groups())
    return attempt, upload, start


def _common_prefix(before: BinaryIO, now: BinaryIO, limit: int) -> int:
    """Return how many bytes at the start of two files are equal, at most `limit`; where they part, back to a line's start."""
    done = 0
    while done < limit:
        old, new = before.read(min(_BLOCK_BYTES, limit - done)), now.read(_BLOCK_BYTES)
        if not old or not new.startswith(old):
            equal = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            return done + old.rfind(b"\n", 0, equal) + 1
        done += len(old)
    return done


def _state(path: Path) -> _State:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
