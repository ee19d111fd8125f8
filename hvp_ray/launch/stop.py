"""Stop a run: a signal sets a request that driver and trainers poll, and the driver detects that Ray died."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from hvp_ray.errors import HvpRayError, StageError
from hvp_ray.stream.connect import dead_processes, is_ray_lost

PATIENCE_SECONDS = 60.0
"""Time to write a checkpoint after a stop is requested."""
_LAST_CHECKPOINT_SECONDS = 2.0


class StoppedError(HvpRayError):
    """The run was asked to stop, and stopped after writing a checkpoint if there was time."""


class StopRequest:
    """A request to stop after the next checkpoint, with a deadline. Threads may share it.

    There is no lock: a signal handler sets the request, and the thread that it interrupts could hold the lock.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._deadline = float("inf")

    def ask(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Ask to stop within this time. An earlier deadline stays."""
        self._deadline = min(self._deadline, time.monotonic() + patience_seconds)
        self._is_asked = True

    @property
    def is_asked(self) -> bool:
        """Return whether the run shall stop."""
        return self._is_asked

    @property
    def is_overdue(self) -> bool:
        """Return whether the deadline has passed."""
        return time.monotonic() > self._deadline


@contextlib.contextmanager
def stop_on_signals(request: StopRequest, *, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Let SIGTERM and the first Ctrl-C request a stop. A second signal raises KeyboardInterrupt.

    Only the main thread receives signals. In another thread this has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if request.is_asked:
            raise KeyboardInterrupt
        request.ask(patience_seconds)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RayProcesses:
    """Ends a run whose local Ray died. Any call of Ray would block for a minute and then end this process."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._lost_since: float | None = None

    def check(self, *, patience_seconds: float = _LAST_CHECKPOINT_SECONDS) -> None:
        """Raise if a process that Ray needs ended this long ago. Until then trainers may be writing a checkpoint.

        Raises:
            StoppedError: the run was asked to stop, and the signal ended Ray too.
            StageError: Ray died.
        """
        if not is_ray_lost():
            return
        self._lost_since = self._lost_since or time.monotonic()
        if time.monotonic() - self._lost_since < patience_seconds:
            return
        names = ", ".join(dead_processes())
        again = "start the run again with its name to continue from the last checkpoint"
        if self._stop.is_asked:
            raise StoppedError(f"stopped together with Ray ({names} ended too); {again}")
        raise StageError(
            f"Ray ended during the run: {names} died, perhaps killed for lack of memory (see the system's log); {again}"
        )
