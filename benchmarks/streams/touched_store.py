"""Touch the object store's memory in a view worker, so that what is measured is a copy and not the first use of pages.

The store is shared memory. Its pages are made when somebody first writes to them, and every process has to map each of them
once, 4 KiB at a time: 154 MB are 37,600 page faults, which cost a worker several times what the copy costs. It happens once
for every page of the store and every worker; a run of thousands of steps does not see it, a benchmark of twenty steps does.
"""

import ctypes
import re
from pathlib import Path
from typing import Any

MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later: map pages for writing, and make those that are not there; what is in them stays."""


def touch_store(_worker: Any) -> int:
    """Touch all of the store in this process; return bytes: 0 where this process or kernel cannot.

    For `worker.__ray_call__.remote(touch_store)`, after the worker has returned its first batch.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    num_bytes = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw\S* .*plasma", line)
        if found is not None:
            start, end = (int(edge, 16) for edge in found.groups())
            if libc.madvise(start, end - start, MADV_POPULATE_WRITE) == 0:
                num_bytes += end - start
    return num_bytes
