"""Wrappers of a model for each device and number of ranks.

| device | ranks | BatchNorm | gradients |
|---|---|---|---|
| any | 1 | as it is | as they are |
| cpu (gloo) | 2 | CpuSyncBatchNorm | DDP |
| cpu (gloo) | 3 and more | CpuSyncBatchNorm | one flat all-reduce in the order of the parameters |
| cuda (nccl) | 2 and more | torch's SyncBatchNorm | DDP |

DDP rebuilds its buckets after its first step, in the order in which gradients arrive. A restarted run has another first
step, so its buckets, summation order and bits would differ. The sum of two ranks does not depend on the order, so DDP is
used for two gloo ranks only.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

from hvp_ray.distributed.batch_norm import convert_to_cpu_sync_batch_norm
from hvp_ray.distributed.world import World

logger = logging.getLogger(__name__)


def synchronize_batch_norm(method: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Make BatchNorm use the statistics of all ranks; before the optimizer is built."""
    if world.num_ranks == 1:
        return method
    if device.type == "cpu":
        return convert_to_cpu_sync_batch_norm(method, world.num_ranks)
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    return converted


@dataclass(frozen=True, kw_only=True, slots=True)
class WrappedMethod:
    """A method as it is trained."""

    forward: nn.Module
    """The module whose forward is trained."""
    reduce_gradients: Callable[[], None]
    """Call it between the last backward and the update."""
    without_reduction: Callable[[], AbstractContextManager[None]]
    """Forward and backward in this context add up gradients on this rank only; for all parts of a step but the last."""


def wrap_for_training(method: nn.Module, world: World, device: torch.device) -> WrappedMethod:
    """Wrap a method so that all ranks train on the mean of their gradients."""
    if world.num_ranks == 1:
        return WrappedMethod(forward=method, reduce_gradients=_nothing, without_reduction=nullcontext)
    if device.type == "cpu" and world.num_ranks > 2:
        logger.info("gradients: one flat all-reduce in the order of the parameters (gloo, %d ranks)", world.num_ranks)
        return WrappedMethod(
            forward=method, reduce_gradients=lambda: all_reduce_gradients(method), without_reduction=nullcontext
        )
    logger.info("gradients: DistributedDataParallel (%s, %d ranks)", dist.get_backend(), world.num_ranks)
    wrapped = DistributedDataParallel(
        method,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,  # synchronized BatchNorm keeps them equal
        gradient_as_bucket_view=True,
    )
    return WrappedMethod(forward=wrapped, reduce_gradients=_nothing, without_reduction=wrapped.no_sync)


def all_reduce_gradients(module: nn.Module) -> None:
    """Average the gradients over ranks, in one buffer, in the order of the parameters."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, reduced in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(reduced)


def _nothing() -> None:
    """Do nothing: the gradients are already reduced."""
