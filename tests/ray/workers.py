"""Define view workers with faults, in a small file, because each actor's process imports it."""

import os
import signal
import time
from typing import Any

from hvp_ray.errors import StageError
from hvp_ray.records import BatchDraft, BatchRequest, DecodedImages, ViewBatch
from hvp_ray.stream.view_finisher import ViewFinisher
from hvp_ray.stream.view_worker import ViewWorker


class SlowWorker(ViewWorker):
    """A view worker that takes at least `seconds` for each batch."""

    def __init__(self, values: dict[str, Any], name: str, seconds: float) -> None:
        super().__init__(values, "cpu", name)
        self._seconds = seconds

    def set_seconds(self, seconds: float) -> None:
        """Change the time for each batch."""
        self._seconds = seconds

    def render(self, request: BatchRequest) -> ViewBatch:
        started = time.perf_counter()
        batch = super().render(request)
        time.sleep(max(0.0, self._seconds - (time.perf_counter() - started)))
        return batch


class SlowFinisher(ViewFinisher):
    """A view finisher that takes `seconds` for each batch."""

    def __init__(self, values: dict[str, Any], name: str, seconds: float) -> None:
        super().__init__(values, name)
        self._seconds = seconds

    def finish(self, draft: BatchDraft, decoded: DecodedImages) -> ViewBatch:
        time.sleep(self._seconds)
        return super().finish(draft, decoded)


class PoisonedWorker(ViewWorker):
    """A view worker that one image kills, as a bug in a decoder would, and that finds this image when asked for such images.

    `worker-0` fails to start the process that searches.
    """

    def __init__(self, values: dict[str, Any], name: str, poison_id: int) -> None:
        super().__init__(values, "cpu", name)
        self._poison_id = poison_id
        self._cannot_search = name == "worker-0"

    def render(self, request: BatchRequest) -> ViewBatch:
        if self._poison_id in request.sample_ids.tolist() and self._poison_id not in request.quarantined_ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().render(request)

    def find_crashing_ids(self, request: BatchRequest) -> list[int]:
        if self._cannot_search:
            raise StageError("no memory for another process")
        return [i for i in request.sample_ids.tolist() if i == self._poison_id]
