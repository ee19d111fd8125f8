"""Define view workers with faults, in a small file, because each actor's process imports it."""

import dataclasses
import os
import signal
import time
from typing import Any

from hvp_ray.errors import StageError
from hvp_ray.records import BatchDraft, BatchRequest, DecodedImages, ViewBatch
from hvp_ray.stream.view_worker import ViewFinisher, ViewWorker


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

    def finish(self, decoded: tuple[BatchDraft, DecodedImages]) -> ViewBatch:
        time.sleep(self._seconds)
        return super().finish(decoded)


class PoisonedWorker(ViewWorker):
    """A view worker that one image kills, as a bug in a decoder would; and reports it when it searches for such images.

    The first one's machine cannot start the process that searches.
    """

    def __init__(self, values: dict[str, Any], name: str, poison_id: int) -> None:
        super().__init__(values, "cpu", name)
        self._poison_id = poison_id
        self._cannot_search = name == "worker-0"

    def render(self, request: BatchRequest) -> ViewBatch:
        batch = super().render(self._survive(request))
        return dataclasses.replace(batch, crashing_ids=self._found(request))

    def decode(self, request: BatchRequest) -> tuple[BatchDraft, DecodedImages]:
        draft, decoded = super().decode(self._survive(request))
        return dataclasses.replace(draft, crashing_ids=self._found(request)), decoded

    def _found(self, request: BatchRequest) -> tuple[int, ...]:
        return (self._poison_id,) if request.search_crashing else ()

    def _survive(self, request: BatchRequest) -> BatchRequest:
        """Die of the image, or search for it."""
        if request.search_crashing and self._cannot_search:
            raise StageError("no memory for another process")
        quarantined_ids = (*request.quarantined_ids, *self._found(request))
        if self._poison_id in request.sample_ids.tolist() and self._poison_id not in quarantined_ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return dataclasses.replace(request, quarantined_ids=quarantined_ids, search_crashing=False)
