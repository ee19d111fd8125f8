"""The view worker: a Ray actor, a shell around `render_batch`.

It returns values, never references, so that the trainer that asked owns them and they outlive the worker. It keeps
no state between calls; every call may be repeated, on any worker, with the same result.
"""

import os
from typing import Any

import cv2
import numpy as np
import ray
import torch

from hvp_ray.config import RendererName, config_from_dict
from hvp_ray.data.dataset import open_dataset
from hvp_ray.records import BatchRequest, ViewBatch
from hvp_ray.stream.isolation import find_crashing_images
from hvp_ray.stream.render_batch import RenderContext, build_render_context, read_images, render_batch


def open_render_context(config_values: dict[str, Any], renderer: RendererName) -> RenderContext:
    """Open the data and make the renderer of a run, in the process that renders.

    Raises:
        DataError: the source cannot be opened from here.
        ConfigError: the renderer cannot be had here.
    """
    config = config_from_dict(config_values)
    return build_render_context(config, open_dataset(config.data), renderer)


class ViewWorker:
    """See the module. Made by `pool.ViewWorkerPool`."""

    def __init__(self, config_values: dict[str, Any], renderer: RendererName, name: str) -> None:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self._name = name
        self._context = open_render_context(config_values, renderer)

    def process_id(self) -> int:
        """Return the process id; also serves to wait until the worker is up."""
        return os.getpid()

    def render(self, request: BatchRequest) -> ViewBatch:
        """Render one batch."""
        return render_batch(self._context, request, worker=self._name)

    def find_crashing_ids(self, request: BatchRequest) -> list[int]:
        """Return the sample ids of the request that crash a decoder's process on their own."""
        ids = [i for i in request.sample_ids.tolist() if i not in request.quarantined_ids]
        images = read_images(self._context.source, np.array(ids).tolist()).images
        crashing = find_crashing_images(images, max_pixels=self._context.data.max_image_pixels)
        return [ids[index] for index in crashing]


ViewWorkerActor: Any = ray.remote(max_restarts=-1, max_task_retries=0)(ViewWorker)
"""`ViewWorker` as an actor. Ray restarts the process; the stream alone repeats calls."""
