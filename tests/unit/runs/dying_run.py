"""A run whose machine dies at a step."""

from concurrent.futures import Future

import pytest
import torch

from hvp_ray.config import RunConfig, config_to_dict
from hvp_ray.distributed.world import World
from hvp_ray.identity import Identity
from hvp_ray.resolved_run import resolve_inline
from hvp_ray.runs.opened_rank import RankServices
from hvp_ray.runs.prepare import prepare_run
from hvp_ray.runs.rank import train_rank
from hvp_ray.stream.batches import BatchStream, InlineBatches, RequestOf
from hvp_ray.stream.device import CopyToDevice, DeviceBatch
from hvp_ray.stream.render_batch import open_render_context


class PowerCutError(Exception):
    """The machine dies."""


class _StreamThatDies:
    """A trainer's stream, until the machine dies."""

    def __init__(self, stream: InlineBatches, batches_left: int) -> None:
        self._stream = stream
        self._batches_left = batches_left
        self.stats = stream.stats

    def next_batch(self) -> DeviceBatch:
        if not self._batches_left:
            raise PowerCutError
        self._batches_left -= 1
        return self._stream.next_batch()

    def close(self) -> None:
        self._stream.close()


def train_and_die(config: RunConfig, *, at_step: int, planned: Identity | None = None) -> None:
    """Train as `pretrain_in_process` does, until the batch of step `at_step` (from 0) is asked for."""
    job = prepare_run(config, resolve_inline(config.cluster), planned=planned)
    device = torch.device("cpu")
    context = open_render_context(config_to_dict(config), "cpu")

    def open_stream(request_of: RequestOf, first_step: int, _end_step: int) -> BatchStream:
        stream = InlineBatches(context, request_of, first_step=first_step, copy_to_device=CopyToDevice(device))
        return _StreamThatDies(stream, at_step - first_step)

    services = RankServices(
        open_stream=open_stream,
        report_progress=lambda _progress: False,
        submit_knn=lambda snapshot: Future(),  # takes longer than the machine lives
        cluster_facts=lambda: {},
    )
    with pytest.raises(PowerCutError):
        train_rank(job, World(), device, services)
