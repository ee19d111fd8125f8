"""Rank of this process, and the collectives that the training step receives as arguments."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hvp_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A rank among ranks."""

    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(f"rank={self.rank} must be from 0 to num_ranks - 1 = {self.num_ranks - 1}")


def current_world() -> World:
    """Find the world of this process: the process group's, or a single process."""
    if dist.is_available() and dist.is_initialized():
        return World(rank=dist.get_rank(), num_ranks=dist.get_world_size())
    return World()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a detached tensor over all ranks; every rank gets the same bits."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed / dist.get_world_size()


def share_from_rank_0(text: str, device: torch.device) -> str:
    """Return rank 0's text on every rank."""
    shared = [text]
    dist.broadcast_object_list(shared, src=0, device=device)
    return shared[0]


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        summed = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the differentiable sum over all ranks."""
    result: Tensor = _AllReduceSum.apply(values)
    return result


class _AllGather(torch.autograd.Function):
    """Gather over ranks whose gradient is the sum of the gradients that all ranks have for this rank's part."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed[dist.get_rank()]


def gather_over_ranks(values: Tensor) -> Tensor:
    """Return the values of all ranks, [R, ...]; differentiable, with the gradient of all ranks' losses.

    With DDP's mean over ranks on top, a loss that every rank computes for its own rows has the gradient of the mean of
    all ranks' losses: that of one rank with the global batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values[None]
    result: Tensor = _AllGather.apply(values)
    return result
