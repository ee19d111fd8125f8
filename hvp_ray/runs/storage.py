"""A run's folder on a bucket, and each rank's working copy of it on the local disk.

A rank reads and writes files in its working copy as if it were the run's folder. Checkpoints alone go straight to the bucket
(`checkpoint.py`) and are never here. Three guarantees:

- What a checkpoint presupposes (the log up to its step, with the decisions of every rank) is on the bucket before its
  manifest is. `recorder.push_on_all_ranks` pushes before each commit.
- The bucket is the truth. Opening empties the working copy and pulls, so nothing that an earlier attempt left counts.
- An attempt may die between any two uploads. The next one pulls what had arrived.

A push uploads each file that is new or changed as a whole. Files of the log never change once their segment is closed
(`tracking/run_log.py`), so each of their bytes is uploaded once. Files of trackers grow during the whole run and are written
from the log, so they are uploaded when the run has finished.
"""

import contextlib
import fcntl
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.files import Folder, join_uri
from hvp_ray.local_cache import cache_folder, no_local_disk, write_local
from hvp_ray.runs import ownership
from hvp_ray.tracking import tensorboard, wandb
from hvp_ray.tracking.unreadable_log import is_decision, is_decision_of

_LAST = "summary.json"
_NOT_MIRRORED = ("checkpoints/", "ray_train/", f"{ownership.FOLDER}/")
_AT_THE_END = (f"{tensorboard.FOLDER}/", f"{wandb.FOLDER}/")
_REQUESTS_AT_ONCE = 8
_LOCK_PATIENCE_SECONDS = 60.0

_State = tuple[int, int, int]
"""Inode, time of the last change in ns, size in bytes; they change if the content does."""


class RunStorage:
    """A run's folder as one rank sees it; a context manager. It does nothing for a run in a local folder."""

    def __init__(self, run_dir: Path, run_uri: str | None, *, rank: int, attempt: int | None = None) -> None:
        """Claim the working copy for this process and pull from the bucket.

        Args:
            run_dir: the run's folder if `run_uri` is None.
            run_uri: the run's folder on a bucket.
            rank: rank of this process.
            attempt: number of this attempt. Each has its own working copy, because a paused process of an earlier attempt
                keeps its copy locked. None: no attempt at the run; the copy is shared.

        Raises:
            ConfigError: the bucket or the local disk cannot be used, or another process works on the run.
            CheckpointError: the bucket failed while it was read.
        """
        self.folder = run_dir
        """Folder in which this rank reads and writes the run's files."""
        self._rank = rank
        self._remote: Folder | None = None
        if run_uri is None:
            return
        self._remote = Folder(run_uri)
        of_attempt = "" if attempt is None else f"-attempt-{attempt:04d}"
        self.folder = working_folder(run_uri) / f"rank-{rank}{of_attempt}"
        self._pushed: dict[str, _State] = {}
        self._busy = threading.Lock()
        self._claim = _claim(self.folder)
        _sweep(self.folder.parent, f"rank-{rank}-attempt-*.lock", but=self.folder)
        try:
            self._pull(lambda name: self._is_ours(name) or is_decision(name))
        except BaseException:
            self._claim.close()
            raise

    def push(self) -> None:
        """Upload this rank's new and changed files, the summary last, then delete files that no longer exist here.

        Raises:
            CheckpointError: the bucket refused, also after retries.
        """
        if self._remote is None:
            return
        with self._busy, self._naming("written"):
            names = self._own_files()
            with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
                uploads = [pool.submit(self._upload, self._remote, name) for name in names if name != _LAST]
            for upload in uploads:
                upload.result()
            if _LAST in names:
                self._upload(self._remote, _LAST)
            for name in set(self._pushed) - set(names):
                self._remote.delete(name)
                del self._pushed[name]

    def push_file(self, name: str) -> None:
        """Upload one file if it changed; other threads than that of training may call this.

        Raises:
            CheckpointError: see `push`.
        """
        if self._remote is not None:
            with self._busy, self._naming("written"):
                self._upload(self._remote, name)

    def pull_decisions(self) -> None:
        """Download the other ranks' decisions on unreadable images.

        Raises:
            CheckpointError: the bucket failed.
        """
        if self._remote is not None:
            self._pull(lambda name: is_decision(name) and not self._is_ours(name))

    def __enter__(self) -> "RunStorage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Delete the working copy; after an error it stays until the next attempt on this machine."""
        if self._remote is None:
            return
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._claim.close()

    def _is_ours(self, name: str) -> bool:
        return is_decision_of(name, self._rank) if is_decision(name) else self._rank == 0

    def _pull(self, wanted: Callable[[str], bool]) -> None:
        assert self._remote is not None
        with self._naming("read"), ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            names = [name for name in self._remote.names() if not name.startswith(_NOT_MIRRORED) and wanted(name)]
            for name, content in zip(names, pool.map(self._remote.read, names), strict=True):
                if content is None:  # deleted since it was listed
                    continue
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                if self._is_ours(name):
                    self._pushed[name] = _state(path)

    def _own_files(self) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.suffix != ".part")
        names = (path.relative_to(self.folder).as_posix() for path in files)
        not_yet = () if (self.folder / _LAST).exists() else _AT_THE_END
        return sorted(name for name in names if self._is_ours(name) and not name.startswith(not_yet))

    def _upload(self, remote: Folder, name: str) -> None:
        path = self.folder / name
        state = _state(path)
        if self._pushed.get(name) != state:
            remote.write(name, path.read_bytes())
            self._pushed[name] = state

    @contextmanager
    def _naming(self, done: str) -> Iterator[None]:
        """Raise an OSError as a CheckpointError that says what to do."""
        assert self._remote is not None
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"the run's folder {self._remote.location} could not be {done}: {error}. Its checkpoints are untouched. "
                f"Files that were not uploaded are in {self.folder}. Repair the storage, then start the run again with its "
                f"name to resume it"
            ) from error


def working_folder(uri: str) -> Path:
    """Return the folder on this machine that belongs to a run's URI, in the user's cache.

    Raises:
        ConfigError: this account has no home folder.
    """
    name = uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return cache_folder() / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16] / (name or "run")


def fetch_run(uri: str, *, files: tuple[str, ...] = (), folders: tuple[str, ...] = (), option: str) -> Path:
    """Download files of a run; return the folder that has them.

    Args:
        uri: the run's folder on a bucket.
        files: names; one that is missing there is missing here.
        folders: names; older content here is deleted.
        option: setting that gave the URI, for messages.

    Raises:
        ConfigError: the URI or the local disk cannot be used.
        CheckpointError: there is no such run, or the bucket failed.
    """
    remote, target = Folder(uri, option=option), working_folder(uri) / "copy"
    try:
        if remote.read("config.json") is None:
            raise CheckpointError(f"{option}={uri!r}: there is no run ({join_uri(uri, 'config.json')} is missing)")
        names = [*files, *(name for folder in folders for name in remote.names(folder))]
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
                write_local(target / name, content)
    except OSError as error:
        raise no_local_disk(target, error) from error
    return target


def _claim(folder: Path) -> BinaryIO:
    """Lock and empty a working copy; return the file whose closing releases it.

    Raises:
        ConfigError: another process keeps it, or the disk cannot be used.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("ab")
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS  # an attempt that was killed may take a while to exit
        while not _lock(lock):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another process of this machine works on the same run ({lock.name} is locked); wait until it ends, or "
                    f"take another run.name"
                )
            time.sleep(0.2)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        raise no_local_disk(folder, error) from error
    return lock


def _sweep(folder: Path, locks: str, *, but: Path) -> None:
    """Delete the working copies of attempts that have ended, as far as possible."""
    for path in folder.glob(locks):
        if path.with_suffix("") != but:
            with contextlib.suppress(OSError), path.open("ab") as lock:
                if _lock(lock):
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink()


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _state(path: Path) -> _State:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
