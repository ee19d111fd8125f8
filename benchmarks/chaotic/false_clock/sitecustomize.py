"""Shift the time of day that Python code sees, in every process with this folder on its path.

The file CHAOS_CLOCK holds seconds to add; it is read once a second. Ray's processes in C++ see the true clock: libfaketime,
which would shift it for them too, breaks `time.sleep` of Python 3.11.
"""

import os
import time
from pathlib import Path

_file = Path(os.environ["CHAOS_CLOCK"])
_true_time_ns, _monotonic = time.time_ns, time.monotonic
_shift_ns, _read_at = 0, float("-inf")


def _time_ns() -> int:
    global _shift_ns, _read_at
    now = _monotonic()
    if now > _read_at + 1.0:
        _read_at = now
        _shift_ns = int(_file.read_text()) * 10**9
    return _true_time_ns() + _shift_ns


def _time() -> float:
    return _time_ns() / 1e9


time.time_ns, time.time = _time_ns, _time
