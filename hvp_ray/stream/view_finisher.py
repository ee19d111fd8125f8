"""The view finisher: a Ray actor beside its trainer that renders the views of images which view workers decoded.

Used with cluster.ship=pixels, where the link to the trainer's node carries each image once instead of each of its views. Made
by the trainer, on the trainer's node, and dies with it; it keeps nothing between calls.
"""

import dataclasses
import os
from typing import Any

import cv2
import ray
import torch
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hvp_ray.config import RunConfig, config_from_dict, config_to_dict
from hvp_ray.logs import note_step, set_up_logging
from hvp_ray.records import BatchDraft, DecodedImages, ViewBatch
from hvp_ray.stream.metrics import WORKER_METRICS, MetricsPublisher, RenderedNumbers
from hvp_ray.stream.render_batch import finish_batch
from hvp_ray.views.render_cpu import CpuRenderer


class ViewFinisher:
    """See the module."""

    def __init__(self, config_values: dict[str, Any], name: str) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        config = config_from_dict(config_values)
        run = config.run.name or "unnamed"
        set_up_logging(run=run, origin=f"finisher={name}")
        self._rendered = RenderedNumbers()
        MetricsPublisher(WORKER_METRICS, {"run": run, "worker": name}).watch(self._rendered.numbers)
        self._renderer = CpuRenderer(config.views, max_image_pixels=config.data.max_image_pixels)

    def process_id(self) -> int:
        """Return the process id; also tells that it is up."""
        return os.getpid()

    def finish(self, draft: BatchDraft, decoded: DecodedImages) -> ViewBatch:
        """Render the views of one batch."""
        note_step(draft.step)
        batch = finish_batch(self._renderer, draft, decoded)
        here = dataclasses.replace(
            batch,
            replacements=(),  # counted by the view worker
            render_seconds=batch.render_seconds - draft.render_seconds,
            render_cpu_seconds=batch.render_cpu_seconds - draft.render_cpu_seconds,
        )
        self._rendered.take(here)
        return batch


_ViewFinisherActor: Any = ray.remote(
    num_cpus=0, max_restarts=-1, max_task_retries=0, enable_task_events=False, allow_out_of_order_execution=True
)(ViewFinisher)
"""Out of order: a batch whose pixels are long in coming does not hold up those behind it."""


def start_finishers(config: RunConfig, *, rank: int) -> list[ActorHandle[Any]]:
    """Start the finishers of this trainer on its node; their CPUs are part of what the trainer has reserved.

    Returns:
        none, where views are shipped.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = _ViewFinisherActor.options(scheduling_strategy=here)
    values, count = config_to_dict(config), config.cluster.num_finishers
    return [actor.remote(values, f"view-finisher-{rank}-{index}") for index in range(count)]
