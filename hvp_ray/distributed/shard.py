"""Sharded training: every rank keeps a part of each parameter, its gradient and its optimizer state (torch's FSDP2).

Whole parameters exist one block at a time, in forward and in backward. Scoring gathers them too. Checkpoints hold whole
tensors, so a run may continue on another number of ranks, or unsharded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from hvp_ray.distributed.world import World
from hvp_ray.distributed.wrap import WrappedMethod

_FORWARD_METHODS = ("score", "contrast_features")
"""Methods that forward the networks, besides `forward`."""


def shard_for_training(
    method: nn.Module, blocks: Sequence[nn.Module], world: World, device: torch.device
) -> WrappedMethod:
    """Replace the parameters of a method by parts of them, in place; before the optimizer is built.

    Parameters are gathered in float32 also under autocast, because layer norms compute with them in float32.

    Args:
        method: its parameters outside the blocks are gathered for the whole forward pass.
        blocks: modules in it whose parameters are gathered only while they run.
        world: the ranks.
        device: device of the parameters.
    """
    method.to(
        memory_format=torch.contiguous_format
    )  # the patch embedding may be channels-last, which cannot be sharded
    mesh = init_device_mesh(device.type, (world.num_ranks,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh)
    for name in _FORWARD_METHODS:
        register_fsdp_forward_method(method, name)
    return WrappedMethod(
        forward=method, reduce_gradients=lambda: None, without_reduction=lambda: _without_reduction(method)
    )


@contextmanager
def _without_reduction(method: nn.Module) -> Iterator[None]:
    sharded = cast(FSDPModule, method)
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)


def whole(value: Any) -> Any:
    """Return a tensor gathered from all ranks, and anything else as it is; all ranks call this in the same order."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank keeps, or the whole tensor if it is not sharded. They share memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer with its whole tensors sharded as the parameters that they belong to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(parameter: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )

    return state | {
        "state": {
            index: {name: like(parameters[index], value) for name, value in of_parameter.items()}
            for index, of_parameter in state["state"].items()
        }
    }
