"""Memory of a trainer, counted over an imaginary step in the same way for all recipes."""

import dataclasses
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvp_ray.config import RunConfig
from hvp_ray.costs.imaginary import imagine_step
from hvp_ray.methods.method import Method
from hvp_ray.selection import hard_step
from hvp_ray.stream.device import BATCHES_ON_DEVICE
from hvp_ray.training.step import choose_step_views, forward_backward, probe_plans, update_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one trainer's device, without torch itself and its kernels' workspaces."""

    weights: int
    """Parameters and buffers, a teacher's included."""
    gradients: int
    optimizer_state: int
    batches: int
    """Candidate views of `BATCHES_ON_DEVICE` hard steps: the one in use and the next."""
    scoring_peak: int
    """Largest number of live bytes in the scoring pass, with all of the above but gradients."""
    training_peak: int
    """Largest number of live bytes in forward, backward and update."""
    peak: int
    """The larger peak, which the device must hold; with `training.cuda_graphs`, scoring keeps its memory during training."""


def estimate_memory(config: RunConfig) -> MemoryEstimate:
    """Count the memory of one hard step of one trainer, after the optimizer's first step."""
    with imagine_step(config) as imagined, _LiveBytes() as live:
        trainee, method = imagined.trainee, imagined.trainee.method
        pixels = (imagined.batch.global_pixels, imagined.batch.local_pixels, imagined.batch.probe_pixels)
        batch = [of_group for of_group in pixels if of_group is not None]
        weights = [*method.parameters(), *method.buffers()]
        waiting = [torch.empty_like(of_group) for of_group in batch for _ in range(BATCHES_ON_DEVICE - 1)]
        live.add([*weights, *batch, *waiting])
        of_step = hard_step(imagined.config.selection)
        for _ in range(2):  # the optimizer allocates its state in the first step
            trainee.optimizer.zero_grad(set_to_none=True)  # as the step does first
            live.start_peak()
            before_scoring = live.peak
            chosen = choose_step_views(trainee, imagined.batch, imagined.config, of_step)
            probe_plans(trainee, imagined.batch, imagined.config, of_step)
            scoring_peak = live.peak
            live.start_peak()
            trained = forward_backward(trainee, chosen.pixels, imagined.config, step=0, stop_requested=False)
            update_weights(trainee, trained, imagined.config.optimizer)
            training_peak = live.peak
            gradients = _bytes_of(p.grad for p in method.parameters() if p.grad is not None)
            del chosen, trained
        state = imagined.optimizer.state_dict()["state"]
        estimate = MemoryEstimate(
            weights=_bytes_of(weights),
            gradients=gradients,
            optimizer_state=_bytes_of(leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)),
            batches=_bytes_of([*batch, *waiting]),
            scoring_peak=scoring_peak,
            training_peak=training_peak,
            peak=(
                training_peak + scoring_peak - before_scoring
                if config.training.cuda_graphs
                else max(scoring_peak, training_peak)
            ),
        )
        if config.cluster.sharding == "none":
            return estimate
        return _of_a_shard(estimate, method, config)


def _of_a_shard(whole: MemoryEstimate, method: Method, config: RunConfig) -> MemoryEstimate:
    """Return the memory of one of the ranks that share weights, gradients and optimizer state.

    Gathered at once are the weights of two blocks (the running one and the next; in the precision of training), the
    gradients of one, and weights and gradients of everything outside the blocks.
    """
    num_ranks = config.cluster.min_trainers or config.cluster.num_trainers
    blocks = [block for m in method.modules() if isinstance(m, VisionTransformer) for block in m.blocks]
    of_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in method.parameters() if id(parameter) not in of_blocks]
    largest = max(_bytes_of(block.parameters()) for block in blocks)
    gathered = _bytes_of(outside) + (largest if config.training.precision == "bfloat16" else 2 * largest)
    gathered_gradients = _bytes_of(parameter for parameter in outside if parameter.requires_grad) + largest
    weights, gradients, state = (kept // num_ranks for kept in (whole.weights, whole.gradients, whole.optimizer_state))
    spared = whole.weights - weights + whole.optimizer_state - state
    scoring_peak = whole.scoring_peak - spared + gathered
    training_peak = whole.training_peak - spared - (whole.gradients - gradients) + gathered + gathered_gradients
    return dataclasses.replace(
        whole,
        weights=weights,
        gradients=gradients,
        optimizer_state=state,
        scoring_peak=scoring_peak,
        training_peak=training_peak,
        peak=max(scoring_peak, training_peak),
    )


def _bytes_of(tensors: Iterable[Any]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._now = 0
        self.peak = 0

    def start_peak(self) -> None:
        """Start to record the largest value."""
        self.peak = self._now

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors, each once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._sizes:
                continue
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._end, key)
        self.peak = max(self.peak, self._now)

    def _end(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result
