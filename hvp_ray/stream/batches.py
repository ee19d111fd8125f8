"""The interface of all batch streams, the requests of a rank, and a stream that renders in the trainer's process."""

import time
from collections.abc import Callable
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
        predictor: of rule predicted. None: another rule, or nothing was learned.
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
    """Renders each batch on demand in the trainer's process: for one process, torchrun, and as a baseline."""

    def __init__(
        self, context: RenderContext, request_of: RequestOf, *, first_step: int, hand_over: CopyToDevice
    ) -> None:
        self._context = context
        self._request_of = request_of
        self._step = first_step
        self._hand_over = hand_over
        self.stats = StreamStats()

    def next_batch(self) -> DeviceBatch:
        """Render the next step's batch."""
        start = time.perf_counter()
        batch = render_batch(self._context, self._request_of(self._step))
        device_batch = self._hand_over(batch)
        self._step += 1
        self.stats.record_arrival(batch, time.perf_counter() - start)
        self.stats.record_wait(time.perf_counter() - start)
        return device_batch

    def close(self) -> None:
        """Do nothing: no request is in flight."""
