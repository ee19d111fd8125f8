"""A function in a child process: results, errors, crashes and limits of memory."""

import os
import resource

import pytest

from hvp_ray.data.limited_process import CrashError, LimitedProcess, limited_memory
from hvp_ray.errors import DataError


def describe(text: str) -> tuple[int, str]:
    """Called in the child."""
    if text == "crash":
        os.abort()
    if text == "memory":
        return len(bytes(3 * 2**30)), text
    if text == "refuse":
        raise DataError("this text is refused")
    return os.getpid(), text * 2


def test_child_returns_results_raises_our_errors_and_survives_a_crash() -> None:
    with LimitedProcess(f"{__name__}:describe", memory_bytes=2**29) as process:
        first, text = process.call("a")
        assert text == "aa"
        assert first != os.getpid()
        with pytest.raises(DataError, match="this text is refused"):
            process.call("refuse")
        assert process.call("b") == (first, "bb")
        with pytest.raises(CrashError, match="SIGABRT"):
            process.call("crash")
        with pytest.raises(CrashError, match="MemoryError"):
            process.call("memory")
        again, text = process.call("c")
        assert (again != first, text) == (True, "cc")


def test_child_that_cannot_start_is_a_fault_of_the_machine() -> None:
    with (
        LimitedProcess("hvp_ray.absent:describe", memory_bytes=2**29) as process,
        pytest.raises(OSError, match="absent"),
    ):
        process.call("a")


def test_memory_is_limited_inside_and_free_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory(2**28), pytest.raises(MemoryError):
        bytes(2**29)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytes(2**29)) == 2**29
