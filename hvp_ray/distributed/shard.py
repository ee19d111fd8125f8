"""Sharded training: every rank keeps a part of each parameter, its gradient and its optimizer state (torch's FSDP2).

Whole parameters exist one block at a time, in forward and in backward. Scoring gathers them too. In a checkpoint every rank
has a file with its parts; `join_parts` makes whole tensors of them, so a run may continue on another number of ranks, or
unsharded.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from hvp_ray.distributed.world import World
from hvp_ray.distributed.wrap import WrappedMethod

_FORWARD_METHODS = ("score", "contrast_features")
"""Methods that forward the networks, besides `forward`."""


def shard_for_training(
    method: nn.Module, blocks: Sequence[nn.Module], world: World, device: torch.device, *, gathered: torch.dtype
) -> WrappedMethod:
    """Replace the parameters of a method by parts of them, in place; before the optimizer is built.

    Args:
        method: its parameters outside the blocks are gathered for the whole forward pass, in float32.
        blocks: modules in it whose parameters are gathered only while they run.
        world: the ranks.
        device: device of the parameters.
        gathered: type in which the blocks' parameters are gathered; each rank keeps its part, and sums gradients, in
            float32.
    """
    method.to(memory_format=torch.contiguous_format)  # a patch embedding that is channels-last cannot be sharded
    mesh = init_device_mesh(device.type, (world.num_ranks,))
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        if device.type == "cpu" and gathered != torch.float32:
            _fit_norms(block)
    fully_shard(method, mesh=mesh)
    for name in _FORWARD_METHODS:
        register_fsdp_forward_method(method, name)
    # Gradients are reduced in every part of a step: until then each rank would hold those of the whole network.
    return WrappedMethod(forward=method, reduce_gradients=lambda: None, without_reduction=nullcontext)


def _fit_norms(block: nn.Module) -> None:
    """Let layer norms accept weights of a smaller type. Autocast does so on GPUs, in float32, but not on CPUs."""

    def cast_to_weight(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].to(cast(Tensor, norm.weight).dtype),)

    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(cast_to_weight)


def whole(value: Any) -> Any:
    """Return a tensor gathered from all ranks, and anything else as it is; all ranks call this in the same order."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank keeps, or the whole tensor if it is not sharded. They share memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mark_parts(tree: Any) -> Any:
    """Return a tree of the same form: True for a tensor of which each rank keeps a part, False for anything else."""
    return tree_map(lambda value: isinstance(value, DTensor), tree)


def join_parts(of_ranks: Sequence[Any], are_parts: Any) -> Any:
    """Return the tree of whole tensors, from the trees of all ranks in order.

    Args:
        of_ranks: trees in which tensors that are sharded are the rank's own part (`own_part`).
        are_parts: what `mark_parts` returned on one of the ranks.

    Raises:
        ValueError: the trees differ in form.
    """
    return tree_map(lambda is_part, *parts: torch.cat(parts) if is_part else parts[0], are_parts, *of_ranks)


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
