"""Blocks of encoded images on the disk of a node, decompressed once and shared by all processes there.

Where an image costs the reading of its whole block (a row group of a Parquet file), every view worker of a node would
otherwise read every block, because the batches of an epoch go round. Files below the folder for temporary files (TMPDIR);
the operating system keeps what is in use in memory. Nothing in it is needed: it may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvp_ray.errors import first_line

logger = logging.getLogger(__name__)

_IN_USE = "in-use"
_HEADER_BYTES = 8
_ENTRY_BYTES = 16
"""A block's file: number of rows, `entries`, `data`."""
_TIDYING = 2**61
"""Locks of bytes of one file: byte b while block b is made, this one while files are deleted."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedBlock:
    """Encoded images as they were read, in memory."""

    entries: NDArray[np.int64]
    """[rows, 2]: first byte of each image in `data`, taken together, and its length in bytes; 0 where there is no image."""
    data: Sequence[memoryview]

    @property
    def num_bytes(self) -> int:
        """Bytes of all images."""
        return sum(map(len, self.data))

    def image(self, row: int) -> bytes:
        """Return one image."""
        start, length = self.entries[row].tolist()
        for part in self.data:
            if start < len(part):
                return bytes(part[start : start + length])
            start -= len(part)
        return b""


class BlockCache:
    """A bounded cache of blocks. Where the disk refuses, the last block is kept in memory, and that is said once."""

    def __init__(self, key: str, *, max_bytes: int) -> None:
        """Join the cache of this node.

        Args:
            key: what the blocks are blocks of: sources of the same key share them.
            max_bytes: of all blocks of this key on the node, about. 0: the last block in memory only.
        """
        self._max_bytes = max_bytes
        self._added_bytes = 0
        self._has_tidied = False
        self._last: tuple[int, EncodedBlock] | None = None
        self._folder: Path | None = None
        if max_bytes:
            try:
                self._folder, claim = _join(key)
                self._locks = os.open(self._folder / "locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                weakref.finalize(self, _leave, self._folder, claim, self._locks)
            except OSError as error:
                self._give_up(error)

    def read(self, block: int, rows: Sequence[int], make: Callable[[], EncodedBlock]) -> list[bytes]:
        """Return images of a block, which `make` reads if no process of this node has it."""
        if self._folder is not None:
            file = self._open(block)
            if file is None:
                file = self._make(block, make)
            if file is not None:
                try:
                    os.utime(file)  # the least recently used go first
                    (num_rows,) = np.frombuffer(os.pread(file, _HEADER_BYTES, 0), np.int64).tolist()
                    return [_read_image(file, row, num_rows) for row in rows]
                finally:
                    os.close(file)
        last = self._last
        if last is None or last[0] != block:
            last = self._last = (block, make())
        return [last[1].image(row) for row in rows]

    def holds(self, block: int) -> bool:
        """Tell whether a block is there now."""
        return self._folder is not None and (self._folder / str(block)).exists()

    def _open(self, block: int) -> int | None:
        assert self._folder is not None
        try:
            return os.open(self._folder / str(block), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    def _make(self, block: int, make: Callable[[], EncodedBlock]) -> int | None:
        """Make a block, unless another process just does; return the open file. None: it is the last one in memory."""
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, block)
        try:
            file = self._open(block)
            if file is not None:
                return file
            made = make()
            try:
                file = self._store(block, made)
            except OSError as error:
                self._last = (block, made)
                self._give_up(error)
                return None
            self._added_bytes += made.num_bytes + made.entries.nbytes
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, block)
        if not self._has_tidied or self._added_bytes > self._max_bytes // 32:
            self._tidy()
        return file

    def _store(self, block: int, made: EncodedBlock) -> int:
        assert self._folder is not None
        temporary = self._folder / f"{block}.{os.getpid()}.part"
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            header = len(made.entries).to_bytes(_HEADER_BYTES, sys.byteorder)
            for part in (memoryview(header), made.entries.data.cast("B"), *made.data):
                while len(part):
                    part = part[os.write(file, part) :]
            os.replace(temporary, self._folder / str(block))
        except BaseException:
            os.close(file)
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return file

    def _tidy(self) -> None:
        """Delete the least recently used blocks until the rest is well below the bound."""
        assert self._folder is not None
        self._has_tidied, self._added_bytes = True, 0
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, _TIDYING)
        try:
            found = []
            for entry in os.scandir(self._folder):
                with contextlib.suppress(OSError):
                    if entry.name.isdecimal():
                        found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            total = sum(size for _, size, _ in found)
            if total <= self._max_bytes:
                return
            for _, size, path in sorted(found):
                if total <= self._max_bytes - self._max_bytes // 8:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                total -= size
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, _TIDYING)

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            "blocks of images cannot be kept in %s (%s): every process reads them for itself, which is slow; give TMPDIR a "
            "folder with room for data.block_cache_mib",
            tempfile.gettempdir(),
            first_line(error),
        )
        self._folder = None


def _read_image(file: int, row: int, num_rows: int) -> bytes:
    start, length = np.frombuffer(os.pread(file, _ENTRY_BYTES, _HEADER_BYTES + _ENTRY_BYTES * row), np.int64).tolist()
    return os.pread(file, length, _HEADER_BYTES + _ENTRY_BYTES * num_rows + start)


def _join(key: str) -> tuple[Path, int]:
    """Return the folder of a key, and a file descriptor whose lock says that the folder is in use."""
    root = Path(tempfile.gettempdir()) / f"hvp_ray-blocks-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{root} is not a folder of this user alone")
    # What was not yet on the disk when the power went must not be taken for images.
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text() if boot.exists() else ""
    folder = root / hashlib.sha256(f"{key}\n{boot_id}".encode()).hexdigest()[:32]
    for other in root.iterdir():
        if other != folder:
            _delete_if_unused(other)
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            claim = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the last user has just deleted it
        fcntl.flock(claim, fcntl.LOCK_SH)
        try:
            if os.path.samestat(os.fstat(claim), (folder / _IN_USE).stat()):
                return folder, claim
        except FileNotFoundError:
            pass
        os.close(claim)


def _leave(folder: Path, claim: int, locks: int) -> None:
    os.close(locks)
    os.close(claim)
    _delete_if_unused(folder)


def _delete_if_unused(folder: Path) -> None:
    """Delete a folder that no process uses: the last one of a run does, and what was killed is swept by the next."""
    try:
        claim = os.open(folder / _IN_USE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
    finally:
        os.close(claim)
