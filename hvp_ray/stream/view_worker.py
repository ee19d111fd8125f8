"""The view worker: a Ray actor, a shell around `render_batch`.

It returns values, never references, so that the trainer that asked owns them and they outlive the worker. It keeps
no state between calls; every call may be repeated, on any worker, with the same result.
"""

import logging
import os
import time
from typing import Any

import cv2
import ray
import torch

from hvp_ray.config import RendererName
from hvp_ray.errors import ChangedDataError
from hvp_ray.logs import note_step, set_up_logging
from hvp_ray.records import BatchDraft, BatchRequest, DecodedImages, ViewBatch
from hvp_ray.stream.metrics import WORKER_METRICS, MetricsPublisher, RenderedNumbers
from hvp_ray.stream.quarantine import find_crashing_ids
from hvp_ray.stream.render_batch import decode_batch, open_render_context, render_batch

logger = logging.getLogger(__name__)

_START_AGAIN_SECONDS = 2.0


class ViewWorker:
    """See the module. Made by `pool.ViewWorkerPool`."""

    def __init__(
        self, config_values: dict[str, Any], renderer: RendererName, name: str, data_fingerprint: str | None = None
    ) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self._name = name
        run = config_values["run"]["name"] or "unnamed"
        set_up_logging(run=run, origin=f"worker={name}")
        self._rendered = RenderedNumbers()
        MetricsPublisher(WORKER_METRICS, {"run": run, "worker": name}).watch(self._rendered.numbers)
        try:
            self._context = open_render_context(config_values, renderer, data_fingerprint)
        except ChangedDataError:
            raise  # until the run is started again; the pool or the stream hears why
        except Exception as error:
            if not ray.get_runtime_context().was_current_actor_reconstructed:
                raise  # the pool hears why
            # What worked before may work again, here or elsewhere; but Ray tries again only where the process ends.
            logger.error("cannot start again yet: %s: %s", type(error).__name__, error)
            time.sleep(_START_AGAIN_SECONDS)
            os._exit(1)
        logger.info("renders with %s", renderer)

    def process_id(self) -> int:
        """Return the process id; also serves to wait until the worker is up."""
        return os.getpid()

    def render(self, request: BatchRequest) -> ViewBatch:
        """Render one batch."""
        note_step(request.step)
        batch = render_batch(self._context, request, worker=self._name)
        self._rendered.take(batch)
        return batch

    def decode(self, request: BatchRequest) -> tuple[BatchDraft, DecodedImages]:
        """Do the first half of a batch, for a view finisher; called with `num_returns=2`, so that the pixels travel alone."""
        note_step(request.step)
        draft, decoded = decode_batch(self._context, request, worker=self._name)
        self._rendered.take_draft(draft)
        return draft, decoded

    def find_crashing_ids(self, request: BatchRequest) -> list[int]:
        """Return the sample ids that crash a decoder's process on their own, see `quarantine`."""
        note_step(request.step)
        return find_crashing_ids(self._context, request)


ViewWorkerActor: Any = ray.remote(max_restarts=-1, max_task_retries=0, enable_task_events=False)(ViewWorker)
"""`ViewWorker` as an actor. Ray restarts the process; the stream alone repeats calls. Ray's head keeps no record of calls:
they would fill its memory (`docs/experiments.md`)."""
