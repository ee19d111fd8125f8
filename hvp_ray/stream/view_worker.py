"""View workers and view finishers: Ray actors, thin shells around `render_batch`.

A view worker renders a batch. With `cluster.ship=pixels` it decodes only, and a view finisher on the trainer's node renders,
so the link carries each image once instead of each of its views.

Both return values, never references, so the trainer owns the results and they outlive the actor. Neither keeps state between
calls: any call may be retried on any actor with the same result.
"""

import dataclasses
import logging
import os
import time
from typing import Any

import cv2
import ray
import torch
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hvp_ray.config import RendererName, RunConfig, config_from_dict, config_to_dict
from hvp_ray.errors import ChangedDataError
from hvp_ray.logs import note_step, set_up_logging
from hvp_ray.records import BatchDraft, BatchRequest, DecodedImages, ViewBatch
from hvp_ray.stream.metrics import MetricsPublisher, RenderedNumbers
from hvp_ray.stream.render_batch import decode_batch, finish_batch, open_render_context, render_batch
from hvp_ray.tracking.metrics_table import WORKER_METRICS
from hvp_ray.views.render_cpu import CpuRenderer

logger = logging.getLogger(__name__)

_START_AGAIN_SECONDS = 2.0


class _RenderingActor:
    """One thread, a log, and metrics."""

    def __init__(self, config_values: dict[str, Any], name: str, origin: str) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self._name = name
        run = config_values["run"]["name"] or "unnamed"
        set_up_logging(run=run, origin=f"{origin}={name}")
        self._rendered = RenderedNumbers()
        MetricsPublisher(WORKER_METRICS, {"run": run, "worker": name}).watch(self._rendered.numbers)

    def process_id(self) -> int:
        """Return the process id; an answer also shows that the actor is up."""
        return os.getpid()


class ViewWorker(_RenderingActor):
    """Renders or decodes batches. Made by `pool.start_pool`."""

    def __init__(
        self, config_values: dict[str, Any], renderer: RendererName, name: str, data_fingerprint: str | None = None
    ) -> None:
        super().__init__(config_values, name, "worker")
        try:
            self._context = open_render_context(config_values, renderer, data_fingerprint)
        except ChangedDataError:
            raise  # until the run is started again; the pool or the stream reports it
        except Exception as error:
            if not ray.get_runtime_context().was_current_actor_reconstructed:
                raise  # the pool reports it
            # What worked before may work again, here or elsewhere. Ray only retries a start if the process ends.
            logger.error("cannot start again yet: %s: %s", type(error).__name__, error)
            time.sleep(_START_AGAIN_SECONDS)
            os._exit(1)
        logger.info("renders with %s", renderer)

    def render(self, request: BatchRequest) -> ViewBatch:
        """Render one batch."""
        note_step(request.step)
        batch = render_batch(self._context, request, worker=self._name)
        self._rendered.take(batch)
        return batch

    def decode(self, request: BatchRequest) -> tuple[BatchDraft, DecodedImages]:
        """Read, plan and decode one batch; the result is the argument of `ViewFinisher.finish`."""
        note_step(request.step)
        draft, decoded = decode_batch(self._context, request, worker=self._name)
        self._rendered.take(draft)
        return draft, decoded


class ViewFinisher(_RenderingActor):
    """Renders what view workers decoded. Made by a trainer on its own node; dies with it."""

    def __init__(self, config_values: dict[str, Any], name: str) -> None:
        super().__init__(config_values, name, "finisher")
        config = config_from_dict(config_values)
        self._renderer = CpuRenderer(config.views, config.data)

    def finish(self, decoded: tuple[BatchDraft, DecodedImages]) -> ViewBatch:
        """Render the views of one batch."""
        draft, images = decoded
        note_step(draft.step)
        batch = finish_batch(self._renderer, draft, images)
        batch = dataclasses.replace(batch, finish_seconds=batch.render_seconds - draft.render_seconds)
        here = dataclasses.replace(
            batch,
            replacements=(),  # counted by the view worker
            render_seconds=batch.finish_seconds,
            render_cpu_seconds=batch.render_cpu_seconds - draft.render_cpu_seconds,
        )
        self._rendered.take(here)
        return batch


_OPTIONS: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0, "enable_task_events": False}
"""Ray restarts the process; only the stream retries calls. Task events would fill the memory of Ray's head with records of
calls (measured in docs/experiments)."""

ViewWorkerActor: Any = ray.remote(**_OPTIONS)(ViewWorker)
_ViewFinisherActor: Any = ray.remote(num_cpus=0, allow_out_of_order_execution=True, **_OPTIONS)(ViewFinisher)
"""Out of order: a batch whose pixels arrive late does not hold up the batches after it."""


def start_finishers(config: RunConfig, *, rank: int) -> list[ActorHandle[Any]]:
    """Start the finishers of this trainer on its node; their CPUs are part of the trainer's reservation.

    Returns:
        An empty list if views are shipped.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = _ViewFinisherActor.options(scheduling_strategy=here)
    values, count = config_to_dict(config), config.cluster.num_finishers
    return [actor.remote(values, f"view-finisher-{rank}-{index}") for index in range(count)]
