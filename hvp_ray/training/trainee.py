"""From a config to the parts in training: method, optimizer, wrappers, and the state to go on from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_ray.config import RunConfig
from hvp_ray.distributed.world import World, gather_over_ranks, mean_over_ranks
from hvp_ray.distributed.wrap import synchronize_batch_norm, wrap_for_training
from hvp_ray.errors import ConfigError
from hvp_ray.local_cache import local_weights
from hvp_ray.methods.backbones import load_initial_weights
from hvp_ray.methods.method import ALONE, Method, Ranks, build_method
from hvp_ray.randomness import Purpose, draw_torch_seed
from hvp_ray.training.optimizers import build_optimizer
from hvp_ray.training.step import Trainee


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What is needed to go on bit for bit: position and tensors; no random state, because there is none."""

    step: int
    """Number of optimizer steps done."""
    method: dict[str, Tensor]
    optimizer: dict[str, Any]


def build_untrained_method(config: RunConfig, ranks: Ranks = ALONE) -> Method:
    """Build the method with the initial weights of this run: the same on every rank, and at any time later."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_torch_seed(seed=config.run.seed, purpose=Purpose.TORCH_INIT, step=0, rank=0))
        method = build_method(config.method, ranks)
    if config.training.initial_weights is not None:
        weights = local_weights(config.training.initial_weights)
        for encoder in method.encoders:
            load_initial_weights(encoder, weights)
    convert: Any = method.to  # torch's stub does not know this form of the call
    channels_last: Method = convert(memory_format=torch.channels_last)  # CPUs too: convolutions forward twice as fast
    return channels_last


def build_trainee(config: RunConfig, world: World, device: torch.device, checkpoint: Checkpoint | None) -> Trainee:
    """Build everything a step needs, at the state of `checkpoint` or at the start."""
    if config.training.compile and device.type != "cuda":
        raise ConfigError("training.compile=True works on GPUs only, and this run is on a CPU; set it to False")
    ranks = Ranks(rank=world.rank, gather=gather_over_ranks)
    return build_trainee_of(build_untrained_method(config, ranks), config, world, device, checkpoint)


def build_trainee_of(
    method: Method, config: RunConfig, world: World, device: torch.device, checkpoint: Checkpoint | None = None
) -> Trainee:
    """Build everything that a step needs around a method; see `build_trainee`."""
    synchronized = synchronize_batch_norm(method, world, device)
    assert isinstance(synchronized, Method)
    method = synchronized
    if device.type == "cuda":
        method = method.to(device)
    optimizer = build_optimizer(method, config.optimizer, images_per_step=config.training.images_per_step)
    if checkpoint is not None:
        method.load_state_dict(checkpoint.method)
        optimizer.load_state_dict(checkpoint.optimizer)
    wrapped = wrap_for_training(method, world, device)
    compiled = config.training.compile
    return Trainee(
        method=method,
        training_forward=torch.compile(wrapped.forward) if compiled else wrapped.forward,
        score=torch.compile(method.score) if compiled else method.score,
        reduce_gradients=wrapped.reduce_gradients,
        without_reduction=wrapped.without_reduction,
        optimizer=optimizer,
        mean_over_ranks=mean_over_ranks,
        device=device,
        rank=world.rank,
    )


def take_checkpoint(trainee: Trainee, steps_done: int) -> Checkpoint:
    """Copy the state to the host."""
    method = {name: tensor.detach().cpu().clone() for name, tensor in trainee.method.state_dict().items()}
    return Checkpoint(step=steps_done, method=method, optimizer=trainee.optimizer.state_dict())
