"""Other ways to bring the same batches to a trainer: Ray Data and torch's DataLoader.

Both call the product's own `render_batch`, with as many workers as the pool, and look as many batches ahead; one row is a
whole batch, so neither has to split or to join anything. They are asked for an epoch at a time, as their users do.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.streams.setting import Setting, requests_of
from hvp_ray.config import config_from_dict, config_to_dict
from hvp_ray.stream.render_batch import open_render_context, render_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerBatch:
    """A batch as a peer delivers it."""

    pixels: object
    """NumPy array or torch tensor, [V, B, S, S, 3] or [1, V, B, S, S, 3]."""
    render_cpu_seconds: float
    process_id: int
    """Of the worker."""


BetweenEpochs = Callable[[int], None]
"""Called with the number of epochs done, when nothing is under way."""


class StepRenderer:
    """Renders the batch of a step in a process of a peer, which opens the data at the first one."""

    def __init__(self, config_values: dict[str, Any]) -> None:
        self._config_values = config_values
        self._opened: Any = None

    def __call__(self, step: int) -> tuple[NDArray[np.uint8], float]:
        """Return pixels and the CPU time that they took."""
        if self._opened is None:
            torch.set_num_threads(1)
            cv2.setNumThreads(1)
            context = open_render_context(self._config_values, "cpu")
            self._opened = context, requests_of(config_from_dict(self._config_values))
        context, request_of = self._opened
        batch = render_batch(context, request_of(step))
        return batch.global_views.pixels, batch.render_cpu_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return StepRenderer, (self._config_values,)


_of_this_process: dict[str, StepRenderer] = {}


def render_rows(rows: dict[str, Any], *, config_values: dict[str, Any], first_step: int) -> dict[str, Any]:
    """Render the step of one row, for `map_batches`; tasks of one process share what it has opened."""
    renderer = _of_this_process.setdefault(config_values["data"]["source"], StepRenderer(config_values))
    pixels, cpu_seconds = renderer(first_step + int(rows["id"][0]))
    return {
        "pixels": pixels[None],
        "cpu_seconds": np.array([cpu_seconds]),
        "process_id": np.array([os.getpid()]),
    }


def ray_data_batches(setting: Setting, num_workers: int, between_epochs: BetweenEpochs) -> Iterator[PeerBatch]:
    """Yield all batches through Ray Data: one block a step, tasks (which start faster than actors), order preserved."""
    import ray.data

    for name in ("execution.streaming_executor", "progress"):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    values = config_to_dict(setting.config)
    for epoch in range(setting.epochs):
        steps = setting.steps_per_epoch
        rendered = ray.data.range(steps, override_num_blocks=steps).map_batches(
            render_rows,
            batch_size=1,
            fn_kwargs={"config_values": values, "first_step": epoch * steps},
            compute=ray.data.TaskPoolStrategy(size=num_workers),
            num_cpus=1,
        )
        prefetched = setting.config.cluster.batches_in_flight
        for row in rendered.iter_batches(batch_size=1, prefetch_batches=prefetched, batch_format="numpy"):
            yield PeerBatch(
                pixels=row["pixels"],
                render_cpu_seconds=float(row["cpu_seconds"][0]),
                process_id=int(row["process_id"][0]),
            )
        between_epochs(epoch + 1)


class StepDataset(torch.utils.data.Dataset[tuple[torch.Tensor, float, int]]):
    """Step -> pixels, CPU seconds, process id."""

    def __init__(self, config_values: dict[str, Any]) -> None:
        self._renderer = StepRenderer(config_values)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, float, int]:
        pixels, cpu_seconds = self._renderer(step)
        return torch.from_numpy(pixels), cpu_seconds, os.getpid()


class StepsOfEpoch(torch.utils.data.Sampler[int]):
    """The steps of the epoch at hand."""

    def __init__(self, steps_per_epoch: int) -> None:
        self._steps_per_epoch = steps_per_epoch
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self._steps_per_epoch
        return iter(range(first, first + self._steps_per_epoch))

    def __len__(self) -> int:
        return self._steps_per_epoch


def torch_dataloader_batches(setting: Setting, num_workers: int, between_epochs: BetweenEpochs) -> Iterator[PeerBatch]:
    """Yield all batches through torch's DataLoader: processes that stay for all epochs, shared memory."""
    steps = StepsOfEpoch(setting.steps_per_epoch)
    loader = torch.utils.data.DataLoader(
        StepDataset(config_to_dict(setting.config)),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        prefetch_factor=max(1, setting.config.cluster.batches_in_flight // num_workers),
        persistent_workers=True,
        multiprocessing_context="spawn",  # this process has threads of Ray
    )
    for epoch in range(setting.epochs):
        steps.epoch = epoch
        for pixels, cpu_seconds, process_id in loader:
            yield PeerBatch(pixels=pixels, render_cpu_seconds=cpu_seconds, process_id=process_id)
        between_epochs(epoch + 1)
