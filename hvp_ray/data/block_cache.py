"""Blocks of encoded images on the disk of a node, decompressed once and shared by all processes there.

If an image costs reading its whole block (a Parquet row group), every view worker of a node would otherwise read every block.
The files lie below TMPDIR, and the operating system keeps recently used ones in memory. The cache may be deleted at any time.
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
"""Layout of a block's file: number of rows, `entries`, `data`."""
_TIDYING = 2**61
"""Byte of the lock file that is locked while files are deleted. Byte b is locked while block b is written."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedBlock:
    """Encoded images in memory."""

    entries: NDArray[np.int64]
    """[rows, 2]: offset of each image in the concatenated `data`, and its length in bytes; 0 for a missing image."""
    data: Sequence[memoryview]

    @property
    def num_bytes(self) -> int:
        """Size of all images."""
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
    """A bounded cache of blocks. If the disk fails, it warns once and keeps only the last block, in memory."""

    def __init__(self, key: str, *, max_bytes: int) -> None:
        """Join the cache of this node.

        Args:
            key: identifies the content. Sources with the same key share blocks.
            max_bytes: approximate bound on all blocks of this key on the node. 0: keep the last block only, in memory.
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
        """Return images of a block. `make` reads the block if it is not cached."""
        if self._folder is not None:
            file = self._open(block)
            if file is None:
                file = self._make(block, make)
            if file is not None:
                try:
                    os.utime(file)  # the least recently used are deleted first
                    (num_rows,) = np.frombuffer(os.pread(file, _HEADER_BYTES, 0), np.int64).tolist()
                    return [_read_image(file, row, num_rows) for row in rows]
                finally:
                    os.close(file)
        last = self._last
        if last is None or last[0] != block:
            last = self._last = (block, make())
        return [last[1].image(row) for row in rows]

    def holds(self, block: int) -> bool:
        """Tell whether a block is cached now."""
        return self._folder is not None and (self._folder / str(block)).exists()

    def _open(self, block: int) -> int | None:
        assert self._folder is not None
        try:
            return os.open(self._folder / str(block), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    def _make(self, block: int, make: Callable[[], EncodedBlock]) -> int | None:
        """Read and store a block, unless another process has; return the open file. None: it is only in memory."""
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
        """Delete the least recently used blocks until the cache is an eighth below its bound."""
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
            "blocks of images cannot be cached in %s (%s), so every process reads them itself, which is slow; set TMPDIR to "
            "a folder with room for data.block_cache_mib",
            tempfile.gettempdir(),
            first_line(error),
        )
        self._folder = None


def _read_image(file: int, row: int, num_rows: int) -> bytes:
    start, length = np.frombuffer(os.pread(file, _ENTRY_BYTES, _HEADER_BYTES + _ENTRY_BYTES * row), np.int64).tolist()
    return os.pread(file, length, _HEADER_BYTES + _ENTRY_BYTES * num_rows + start)


def _join(key: str) -> tuple[Path, int]:
    """Return the folder of a key, and a file descriptor whose lock marks the folder as in use."""
    root = Path(tempfile.gettempdir()) / f"hvp_ray-blocks-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{root} is not a folder of this user alone")
    # A power failure may leave files without their content, so a cache is valid for one boot only.
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
            continue  # its last user has just deleted it
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
    """Delete a folder that no process uses. The last process of a run does so, or the next run after a kill."""
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
