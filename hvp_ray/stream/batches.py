"""The interface of all batch streams, the requests of a rank, and a stream that renders in the trainer's process."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from hvp_ray.config import RunConfig
from hvp_ray.data.order import SampleOrder
from hvp_ray.records import BatchRequest, Replacement
from hvp_ray.selection import selection_at
from hvp_ray.selection.proposals import HardnessPredictor, proposal_for
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import RenderContext, render_batch
from hvp_ray.stream.stats import StreamStats

RequestOf = Callable[[int], BatchRequest]
"""Maps a step to this rank's request."""


@runtime_checkable
class BatchStream(Protocol):
    """Yields the batches of one rank, in step order."""

    stats: StreamStats

    def next_batch(self) -> DeviceBatch:
        """Wait for the batch of the next step and return it."""
        ...

    def close(self) -> None:
        """Stop requesting batches."""
        ...


def requests_of_rank(
    config: RunConfig,
    order: SampleOrder,
    *,
    rank: int,
    num_ranks: int,
    known_replacements: dict[int, tuple[Replacement, ...]],
    predictor: HardnessPredictor | None = None,
) -> RequestOf:
    """Return the function that addresses this rank's batch of any step.

    Args:
        config: the run.
        order: which samples each step visits.
        rank: this rank.
        num_ranks: number of trainers.
        known_replacements: step -> decisions on unreadable images from an earlier attempt.
        predictor: predictor of the pairs' hardness (rule predicted). None: another rule, or it has learned nothing.
    """
    per_rank = order.images_per_step // num_ranks
    num_steps = config.training.total_steps(order.steps_per_epoch)

    def request_of(step: int) -> BatchRequest:
        of_step = selection_at(config.selection, step, num_steps)
        coefficients = None if predictor is None else predictor.coefficients_of(step)
        return BatchRequest(
            step=step,
            epoch=order.epoch_of(step),
            first_position=order.first_position(step) + rank * per_rank,
            sample_ids=order.sample_ids_of_step(step, rank=rank, num_ranks=num_ranks),
            num_views=of_step.num_views,
            num_local_views=of_step.num_local_views,
            proposal=proposal_for(config.selection, of_step, coefficients),
            num_probe_images=of_step.num_probe_images,
            num_probe_views=config.selection.num_candidate_views,
            known_replacements=known_replacements.get(step, ()),
        )

    return request_of


class InlineBatches:
    """Renders the batches in the trainer's process: for one process, torchrun, and as a baseline.

    With `end_step` a thread renders the next batch, and copies it to the device, while the caller works on the current one.
    That pays if the caller works on a GPU. On a CPU it would take the cores of the step.
    """

    def __init__(
        self,
        context: RenderContext,
        request_of: RequestOf,
        *,
        first_step: int,
        copy_to_device: CopyToDevice,
        end_step: int | None = None,
    ) -> None:
        """Start to prefetch the first batch, if `end_step` is given.

        Args:
            context: data and renderer.
            request_of: the request of any step.
            first_step: step of the first batch.
            copy_to_device: copies a batch to the device.
            end_step: prefetch one batch, up to the step before this one. None: render each batch on request.
        """
        self._context = context
        self._request_of = request_of
        self._step = first_step
        self._end_step = end_step
        self._copy_to_device = copy_to_device
        self.stats = StreamStats()
        self._thread = None if end_step is None else ThreadPoolExecutor(1, thread_name_prefix="inline-views")
        self._prefetched: Future[DeviceBatch] | None = None
        self._begin(first_step)

    def next_batch(self) -> DeviceBatch:
        """Return the next step's batch. The caller must have released the previous batch."""
        start = time.perf_counter()
        self._copy_to_device.release()
        batch = self._render(self._step) if self._prefetched is None else self._prefetched.result()
        self._step += 1
        self._begin(self._step)
        self.stats.record_arrival(batch, time.perf_counter() - start)
        self.stats.record_wait(time.perf_counter() - start)
        return batch

    def close(self) -> None:
        """Wait for the batch that is being rendered, if there is one."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _begin(self, step: int) -> None:
        is_due = self._thread is not None and self._end_step is not None and step < self._end_step
        self._prefetched = self._thread.submit(self._render, step) if self._thread is not None and is_due else None

    def _render(self, step: int) -> DeviceBatch:
        with self._copy_to_device.current_device():
            return self._copy_to_device(render_batch(self._context, self._request_of(step)))
