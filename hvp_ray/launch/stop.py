"""Stop a run: trainers and the driver poll a request that a signal sets, and the driver detects that Ray died."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from hvp_ray.errors import HvpRayError, StageError
from hvp_ray.stream.connect import dead_processes, is_ray_lost

PATIENCE_SECONDS = 60.0
"""A run that was asked to stop has this long to write a checkpoint."""
_LAST_CHECKPOINT_SECONDS = 2.0


class StoppedError(HvpRayError):
    """The run was asked to stop, and stopped after a checkpoint if there was time for one."""


class StopRequest:
    """Whether, and until when, a run shall stop after its next checkpoint. Threads may share it.

    A signal handler asks, so there is no lock: the thread that it interrupts could hold it.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._deadline = float("inf")

    def ask(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """Ask to stop within this time; an earlier deadline stands."""
        self._deadline = min(self._deadline, time.monotonic() + patience_seconds)
        self._is_asked = True

    @property
    def is_asked(self) -> bool:
        """Whether the run shall stop."""
        return self._is_asked

    @property
    def is_overdue(self) -> bool:
        """Whether the time for a checkpoint is over."""
        return time.monotonic() > self._deadline


@contextlib.contextmanager
def stop_on_signals(request: StopRequest, *, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Let SIGTERM and the first Ctrl-C ask for a stop; a second one raises KeyboardInterrupt.

    Only the main thread receives signals; in another thread this changes nothing.
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
    """Ends a run whose local Ray died. A call of Ray would block for a minute, and Ray would then end this process."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._lost_since: float | None = None

    def check(self, *, patience_seconds: float = _LAST_CHECKPOINT_SECONDS) -> None:
        """Raise this long after a process that Ray needs has ended: trainers may still be writing a checkpoint.

        Raises:
            StoppedError: the run was asked to stop; a signal to the whole process group ends Ray too.
            StageError: they died.
        """
        if not is_ray_lost():
            return
        self._lost_since = self._lost_since or time.monotonic()
        if time.monotonic() - self._lost_since < patience_seconds:
            return
        names, again = (
            ", ".join(dead_processes()),
            "start the run again with its name to continue from the last checkpoint",
        )
        if self._stop.is_asked:
            raise StoppedError(f"stopped together with Ray ({names} ended too); {again}")
        raise StageError(
            f"Ray ended during the run: {names} died, perhaps killed for lack of memory (see the system's log); {again}"
        )
