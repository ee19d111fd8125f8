"""Bounds that the system enforces on code that reads bytes of unknown origin: a limit on memory, and a child process.

`limited_memory` makes allocations fail before they fill the machine. `LimitedProcess` calls a function in a process that may
crash. Memory is limited on Linux only.
"""

import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from hvp_ray.errors import HvpRayError

_START_SECONDS = 120.0
_SENT_BY_OTHERS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Signals that another process sends: the arguments of a call are not their cause."""
_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
_one_at_a_time = threading.Lock()


class CrashError(Exception):
    """A function crashed its process at every attempt. The message describes how the process ended."""


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """Let this process take at most `num_bytes` more memory; larger allocations raise MemoryError.

    Counts private writable memory of all threads (RLIMIT_DATA), not shared memory such as Ray's object store. Memory that an
    allocator has reserved before does not count: Arrow's allocator reserves 1 GiB. One thread of a process enters at a time.
    A process that another thread starts meanwhile inherits the limit.
    """
    statm = Path("/proc/self/statm")
    with _one_at_a_time:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        if statm.exists():
            limit = int(statm.read_text().split()[5]) * resource.getpagesize() + num_bytes
            soft = limit if before[0] == resource.RLIM_INFINITY else min(limit, before[0])
            resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


class LimitedProcess:
    """A child process that calls one function. It starts at the first call, and again after a crash."""

    def __init__(
        self, function: str, *, memory_bytes: int | None = None, call_seconds: float = 120.0, num_attempts: int = 2
    ) -> None:
        """Name the function.

        Args:
            function: "module:function". Arguments and results are pickled.
            memory_bytes: memory that the calls may take. None: no limit.
            call_seconds: a call that takes longer hangs.
            num_attempts: of a call. The out-of-memory killer may strike once by chance, so one crash proves nothing.
        """
        self._command = [function, *([] if memory_bytes is None else [str(memory_bytes)])]
        self._call_seconds, self._num_attempts = call_seconds, num_attempts
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "LimitedProcess":
        """Return the process."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._end()

    def call(self, *arguments: Any) -> Any:
        """Call the function and return its result.

        Raises:
            CrashError: the process crashed, hung or ran out of memory, at every attempt.
            HvpRayError: what the function raised.
            OSError: no process could be started, or another process ended it.
        """
        ending = ""
        for _ in range(self._num_attempts):
            process = self._process or self._start()
            try:
                self._connection.send(arguments)
                result, error = self._receive(self._call_seconds)
            except (EOFError, OSError) as fault:
                ending = self._end()
                if -process.returncode in _SENT_BY_OTHERS:
                    raise OSError(f"a child process was ended from outside: {ending}") from fault
                continue
            if error is not None:
                raise error
            return result
        raise CrashError(ending)

    def _start(self) -> "subprocess.Popen[bytes]":
        self._connection, theirs = Pipe()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (`_end` closes it)
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), *self._command],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([_PACKAGE_FOLDER, *filter(None, sys.path)])},
        )
        theirs.close()
        try:
            self._receive(_START_SECONDS)  # it is ready
        except (EOFError, OSError) as error:
            raise OSError(f"a child process of {sys.executable} could not start: {self._end()}") from error
        return process

    def _receive(self, timeout_seconds: float) -> tuple[Any, HvpRayError | None]:
        if not self._connection.poll(timeout_seconds):
            raise EOFError
        received: tuple[Any, HvpRayError | None] = self._connection.recv()
        return received

    def _end(self) -> str:
        """End the process; return how it ended, with the last line that it printed."""
        if self._process is None:
            return ""
        self._connection.close()
        try:
            status = self._process.wait(timeout=1.0)
            how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            how = "no answer"
        self._process = None
        with self._stderr:
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"{how}: {said[-1][:500]}" if said else how


def _serve(connection: Connection, function: str, memory_bytes: str | None = None) -> None:
    """Child: call the function with what arrives until the other side closes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    connection.send((None, None))
    with nullcontext() if memory_bytes is None else limited_memory(int(memory_bytes)):
        while True:
            try:
                arguments = connection.recv()
            except EOFError:
                return
            try:
                connection.send((call(*arguments), None))
            except HvpRayError as error:
                connection.send((None, error))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), *sys.argv[2:])
