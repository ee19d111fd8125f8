"""Wait for a state, by polling: no test sleeps for a guessed time."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 600.0
"""A run starts six processes that import PyTorch, which takes minutes on a machine that others use too."""


def wait_until(
    condition: Callable[[], object], what: str, *, seconds: float = PATIENCE_SECONDS, pause: float = 0.02
) -> None:
    """Poll a condition until it is true.

    Raises:
        TimeoutError: it was false for `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(pause)
