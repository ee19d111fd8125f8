"""The cache of a node: one process reads a block for all, its size is bounded, and its failures stop nothing."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvp_ray.data.block_cache import BlockCache, EncodedBlock

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point TMPDIR to the test's folder; return the folder of the cache."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / f"hvp_ray-blocks-{os.getuid()}"


def _block(number: int, num_bytes: int = 1_000) -> EncodedBlock:
    data = bytes([number]) * num_bytes
    half = num_bytes // 2
    entries = np.array([[0, half], [half, 0], [half, num_bytes - half]])
    return EncodedBlock(entries=entries, data=[memoryview(data[:half]), memoryview(data[half:])])


def _made(number: int, log: list[int]) -> Callable[[], EncodedBlock]:
    def make() -> EncodedBlock:
        log.append(number)
        return _block(number)

    return make


def test_block_is_made_once_for_all_and_read_row_by_row() -> None:
    log: list[int] = []
    one, two = BlockCache("key", max_bytes=2**20), BlockCache("key", max_bytes=2**20)
    for cache in (one, two, one):
        assert cache.read(7, [2, 1, 0], _made(7, log)) == [b"\x07" * 500, b"", b"\x07" * 500]
    assert log == [7]
    other = BlockCache("another key", max_bytes=2**20)
    other.read(7, [0], _made(7, log))
    assert log == [7, 7]


def test_least_recently_used_blocks_go(node: Path) -> None:
    cache, log = BlockCache("key", max_bytes=10_000), []  # type: tuple[BlockCache, list[int]]
    for number in range(50):
        cache.read(number, [0], _made(number, log))
        cache.read(0, [0], _made(0, log))  # in use all the time
        time.sleep(0.002)
    assert log == list(range(50))
    files = [path for path in node.rglob("*") if path.name.isdecimal()]
    assert 5 <= len(files) <= 11
    assert sum(path.stat().st_size for path in files) <= 11_000


def test_processes_share_and_wait_for_each_other(tmp_path: Path) -> None:
    """Four processes request the same blocks at the same time; one of them reads each block."""
    code = (
        "import sys, time; from tests.unit.data.test_block_cache import *\n"
        "from tests.unit.data.test_block_cache import _block\n"
        "cache = BlockCache('key', max_bytes=2**20)\n"
        "def make(number):\n"
        "    open(sys.argv[1], 'a').write(f'{number}\\n'); time.sleep(0.05)\n"
        "    return _block(number)\n"
        "assert all(cache.read(n, [0], lambda: make(n)) == [bytes([n]) * 500] for n in range(8))\n"
        "print('good'); sys.stdin.read()\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "log")],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "good\n"
    assert sorted((tmp_path / "log").read_text().split()) == [str(n) for n in range(8)]
    for child in children:
        child.communicate("")


def test_last_process_deletes_it_and_the_next_sweeps_what_was_killed(node: Path) -> None:
    cache = BlockCache("key", max_bytes=2**20)
    cache.read(1, [0], lambda: _block(1))
    also = BlockCache("key", max_bytes=2**20)
    del cache
    assert len(list(node.iterdir())) == 1
    del also
    assert not list(node.iterdir())
    code = (
        "import os, signal; from hvp_ray.data.block_cache import *\n"
        "from tests.unit.data.test_block_cache import _block\n"
        "cache = BlockCache('of the killed', max_bytes=2**20); cache.read(1, [0], lambda: _block(1))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(list(node.iterdir())) == 1
    kept = BlockCache("key", max_bytes=2**20)
    assert len(list(node.iterdir())) == 1
    assert kept.read(1, [0], lambda: _block(2)) == [b"\x02" * 500]


def test_full_disk_costs_speed_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, log = BlockCache("key", max_bytes=2**20), []  # type: tuple[BlockCache, list[int]]
    cache.read(1, [0], _made(1, log))

    def full(_file: int, _content: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for number in (2, 2, 3, 2):
        assert cache.read(number, [0], _made(number, log)) == [bytes([number]) * 500]
    assert log == [1, 2, 3, 2]  # the last one is in memory
    assert caplog.text.count("No space left on device") == 1
    assert "set TMPDIR to a folder with room" in caplog.text


def test_folder_of_another_user_is_not_used(node: Path, caplog: pytest.LogCaptureFixture) -> None:
    node.mkdir(mode=0o777)
    node.chmod(0o777)
    cache = BlockCache("key", max_bytes=2**20)
    assert cache.read(1, [0], lambda: _block(1)) == [b"\x01" * 500]
    assert "is not a folder of this user alone" in caplog.text
    assert not list(node.iterdir())


def test_deleted_files_are_made_again(node: Path) -> None:
    cache, log = BlockCache("key", max_bytes=2**20), []  # type: tuple[BlockCache, list[int]]
    stop = threading.Event()

    def delete() -> None:
        while not stop.is_set():
            for path in list(node.rglob("*")):
                if path.name.isdecimal():
                    path.unlink(missing_ok=True)

    thread = threading.Thread(target=delete)
    thread.start()
    try:
        for number in range(200):
            assert cache.read(number % 5, [0, 2], _made(number % 5, log)) == [bytes([number % 5]) * 500] * 2
    finally:
        stop.set()
        thread.join()
