"""The model in training: its parts, how they are built from a config, and its state as a checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils._pytree import tree_map

from hvp_ray.config import RunConfig, TrainingConfig
from hvp_ray.distributed.shard import join_parts, mark_parts, own_part, shard_for_training, sharded_state
from hvp_ray.distributed.world import World, gather_over_ranks, mean_over_ranks
from hvp_ray.distributed.wrap import WrappedMethod, synchronize_batch_norm, wrap_for_training
from hvp_ray.errors import ConfigError, RowReuseError
from hvp_ray.methods.backbones import checkpoint_activations
from hvp_ray.methods.initial_weights import load_initial_weights
from hvp_ray.methods.method import ALONE, Method, MethodLoss, Ranks, ViewTensors, build_method
from hvp_ray.randomness import Purpose, draw_torch_seed
from hvp_ray.row_reuse import RowReuse
from hvp_ray.selection import Candidates, CandidateScores
from hvp_ray.selection.candidates import pair_table_on
from hvp_ray.selection.proposals import HardnessPredictor
from hvp_ray.training.optimizers import build_optimizer
from hvp_ray.training.stages import Stage, name_for_profiler


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainee:
    """The parts of a model in training that a step needs."""

    method: Method
    """The bare method: parameters, scoring."""
    training_forward: Callable[..., MethodLoss]
    """The method's forward for training: wrapped, and compiled with `training.compile`."""
    score: Callable[[ViewTensors, Candidates], CandidateScores]
    """The method's `score`; compiled with `training.compile`."""
    reduce_gradients: Callable[[], None]
    without_reduction: Callable[[], AbstractContextManager[None]]
    """See `distributed.wrap.WrappedMethod`."""
    optimizer: torch.optim.Optimizer
    mean_over_ranks: Callable[[Tensor], Tensor]
    device: torch.device
    rank: int
    is_sharded: bool = False
    """Each rank has a part of the parameters, and in a checkpoint; the encoder cannot run alone."""
    predictor: HardnessPredictor | None = None
    """Learns from the probes of rule predicted; None: another rule."""
    stage: Callable[[Stage], AbstractContextManager[None]] = name_for_profiler
    """Entered around each part of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The state from which training continues bit for bit. It holds no random state, because a run has none."""

    step: int
    """Number of optimizer steps done."""
    method: dict[str, Tensor]
    optimizer: dict[str, Any]
    predictor: dict[str, Tensor] = field(default_factory=dict)
    """`HardnessPredictor.state`; empty: there is none."""
    are_parts: tuple[Any, Any] | None = None
    """For one rank's part of a sharded checkpoint: which values of `method` and `optimizer` are parts, in trees of their
    form. None: the checkpoint is whole."""


def join_checkpoints(parts: Sequence[Checkpoint]) -> Checkpoint:
    """Return the whole checkpoint, from the parts of all ranks in order.

    Raises:
        ValueError: the parts differ in form.
    """
    first = parts[0]
    if any(part.are_parts != first.are_parts for part in parts) or (first.are_parts is None and len(parts) > 1):
        raise ValueError("they are not of one checkpoint")
    if first.are_parts is None:
        return first
    of_method, of_optimizer = first.are_parts
    return dataclasses.replace(
        first,
        method=join_parts([part.method for part in parts], of_method),
        optimizer=join_parts([part.optimizer for part in parts], of_optimizer),
        are_parts=None,
    )


def build_untrained_method(config: RunConfig, ranks: Ranks = ALONE) -> Method:
    """Build the method with the initial weights of this run, equal on every rank and at any later time.

    `training.initial_weights` must be a path on this machine; `local_cache.with_local_weights` downloads a URI.

    Raises:
        CheckpointError: the initial weights are missing or fit another network.
        ConfigError: `selection.reuse_student`, `training.activation_checkpointing` or `cluster.sharding` does not fit the
            encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_torch_seed(seed=config.run.seed, purpose=Purpose.TORCH_INIT, step=0, rank=0))
        method = build_method(dataclasses.replace(config.method, backbone=config.encoder), ranks)
    if config.selection.reuse_student:
        try:
            RowReuse(method.backbone)
        except RowReuseError as error:
            raise ConfigError(f"selection.reuse_student=True is not allowed with this encoder: {error}") from error
        if config.training.activation_checkpointing and not isinstance(method.backbone, VisionTransformer):
            raise ConfigError(
                "selection.reuse_student=True is not allowed with training.activation_checkpointing=True, unless the encoder "
                "is a Vision Transformer; set one of the two to False"
            )
    if config.cluster.sharding == "fsdp" and not isinstance(method.backbone, VisionTransformer):
        raise ConfigError(
            f"cluster.sharding=fsdp is not allowed with {config.method.backbone.name}: only Vision Transformers are sharded"
        )
    if config.training.activation_checkpointing:
        checkpoint_activations(method.backbone)
    if config.training.initial_weights is not None:
        for encoder in method.encoders:
            load_initial_weights(encoder, config.training.initial_weights)
    convert: Any = method.to  # torch's stub does not know this form of the call
    channels_last: Method = convert(memory_format=torch.channels_last)  # CPUs too: convolutions forward twice as fast
    return channels_last


def build_trainee(
    config: RunConfig,
    world: World,
    device: torch.device,
    checkpoint: Checkpoint | None,
    build_method: Callable[[RunConfig, Ranks], Method] = build_untrained_method,
) -> Trainee:
    """Build everything a step needs, in the state of `checkpoint`, or as `build_method` returns the method.

    Raises:
        ConfigError: training.compile on a CPU.
    """
    if config.training.compile and device.type != "cuda":
        raise ConfigError("training.compile=True works on GPUs only, and this run is on a CPU; set it to False")
    method = build_method(config, Ranks(rank=world.rank, gather=gather_over_ranks))
    return build_trainee_of(method, config, world, device, checkpoint)


def build_trainee_of(
    method: Method, config: RunConfig, world: World, device: torch.device, checkpoint: Checkpoint | None = None
) -> Trainee:
    """Build everything that a step needs around a method, in the state of `checkpoint` or as the method is."""
    synchronized = synchronize_batch_norm(method, world, device)
    assert isinstance(synchronized, Method)
    method = synchronized
    if device.type == "cuda":
        method = method.to(device)
    if checkpoint is not None:
        method.load_state_dict(checkpoint.method)
    is_sharded = config.cluster.sharding == "fsdp" and world.num_ranks > 1
    wrapped = _shard(method, config, world, device) if is_sharded else wrap_for_training(method, world, device)
    optimizer = build_optimizer(method, config.optimizer, images_per_step=config.training.images_per_step)
    if checkpoint is not None:
        optimizer.load_state_dict(sharded_state(optimizer, checkpoint.optimizer))
    predictor = None
    if config.selection.rule == "predicted":
        predictor = HardnessPredictor(
            delay=config.selection.predictor_delay,
            steps_done=0 if checkpoint is None else checkpoint.step,
            state=None if checkpoint is None else checkpoint.predictor,
        )
    compiled = config.training.compile
    if compiled:
        method.compile_rows()
        torch.compiler.assume_constant_result(pair_table_on)
    return Trainee(
        method=method,
        training_forward=torch.compile(wrapped.forward) if compiled else wrapped.forward,
        score=_scoring(method, config.training) if compiled else method.score,
        reduce_gradients=wrapped.reduce_gradients,
        without_reduction=wrapped.without_reduction,
        optimizer=optimizer,
        mean_over_ranks=mean_over_ranks,
        device=device,
        rank=world.rank,
        is_sharded=is_sharded,
        predictor=predictor,
    )


def _scoring(method: Method, training: TrainingConfig) -> Callable[[ViewTensors, Candidates], CandidateScores]:
    """Return compiled scoring. The result of a CUDA graph is copied, because the next replay overwrites it."""
    if not training.cuda_graphs:
        return torch.compile(method.score)
    replay = torch.compile(method.score, mode="reduce-overhead")

    def score(views: ViewTensors, candidates: Candidates) -> CandidateScores:
        torch.compiler.cudagraph_mark_step_begin()
        return replay(views, candidates).cloned()

    return score


def _shard(method: Method, config: RunConfig, world: World, device: torch.device) -> WrappedMethod:
    transformers = [module for module in method.modules() if isinstance(module, VisionTransformer)]
    blocks = [block for transformer in transformers for block in transformer.blocks]
    return shard_for_training(method, blocks, world, device, gathered=getattr(torch, config.training.precision))


def take_checkpoint(trainee: Trainee, steps_done: int) -> Checkpoint:
    """Copy the state to the host, with shards this rank's part of it; training does not change the copy."""

    def on_host(value: Any) -> Any:
        return own_part(value.detach()).to("cpu", copy=True) if isinstance(value, Tensor) else value

    method, optimizer = dict(trainee.method.state_dict()), trainee.optimizer.state_dict()
    return Checkpoint(
        step=steps_done,
        method=tree_map(on_host, method),
        optimizer=tree_map(on_host, optimizer),
        predictor={} if trainee.predictor is None else trainee.predictor.state(),
        are_parts=(mark_parts(method), mark_parts(optimizer)) if trainee.is_sharded else None,
    )
