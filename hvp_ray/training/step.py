"""One training step of Hard View Pretraining, on one page: score -> choose -> gather -> train -> update.

Legend: V views, B images, P pairs, S slots trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hvp_ray.config import RULES_THAT_SCORE, RunConfig
from hvp_ray.errors import TrainingError
from hvp_ray.methods.method import MethodLoss
from hvp_ray.randomness import Purpose, draw_torch_seed
from hvp_ray.selection import Selection, choose_pairs, gather_views, score_views
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.training.choosing import draw_random_pairs, pair_ious
from hvp_ray.views.normalise import normalise_views


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What a step measured; everything stays on the device until it is reported."""

    loss: Float[Tensor, ""]
    """Mean over all ranks."""
    gradient_norm: Float[Tensor, ""] | None
    """Before clipping; None: not computed."""
    selection: Selection
    scores_BP: Float[Tensor, "batch pairs"] | None  # noqa: N815 (shape letters)
    """Loss that each pair would have given; None: the step did not score."""
    embeddings: Float[Tensor, "batch dim"]
    stop_requested: Float[Tensor, ""]
    """Above 0: some rank was asked to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainee:
    """The parts of a model in training that a step needs."""

    method: nn.Module
    """The bare method: parameters, scoring."""
    training_forward: Callable[[Tensor], MethodLoss]
    """The method's forward as it is trained: wrapped, perhaps compiled."""
    score: Callable[[Tensor], Tensor]
    """The method's `score`, perhaps compiled."""
    reduce_gradients: Callable[[], None]
    optimizer: torch.optim.Optimizer
    mean_over_ranks: Callable[[Tensor], Tensor]
    device: torch.device
    rank: int


def train_step(trainee: Trainee, batch: DeviceBatch, config: RunConfig, *, stop_requested: bool = False) -> StepMetrics:
    """Score the views with the current weights, choose one pair per image, and train on it.

    Raises:
        TrainingError: the loss is not finite on some rank; raised on every rank, before the update.
    """
    step = batch.batch.step
    batch.wait()
    is_hard = config.selection.is_hard_step(step)
    rule = config.selection.rule if is_hard else "first"

    scores_BP = None
    if rule in RULES_THAT_SCORE or config.selection.score_always:
        _seed_torch(config, Purpose.TORCH_SCORING, step, trainee.rank)
        scores_BP = _score(trainee, batch.global_pixels, config)
    selection = choose_pairs(
        rule,
        num_views=batch.global_pixels.shape[0],
        num_images=batch.global_pixels.shape[1],
        device=trainee.device,
        scores_BP=scores_BP,
        iou_BP=pair_ious(batch.batch, trainee.device) if rule == "min_iou" else None,
        random_pairs=draw_random_pairs(batch.batch, config.run.seed, trainee.device) if rule == "random" else None,
    )
    slots = gather_views(batch.global_pixels, selection.view_indices)

    _seed_torch(config, Purpose.TORCH_TRAINING, step, trainee.rank)
    with _autocast(config, trainee.device):
        result = trainee.training_forward(normalise_views(slots, config.views))
    stop = torch.tensor(float(stop_requested), device=trainee.device)
    reduced = trainee.mean_over_ranks(torch.stack([result.loss.detach().float(), stop]))
    finite = _AsyncFlag(torch.isfinite(reduced[0]))
    trainee.optimizer.zero_grad(set_to_none=True)
    result.loss.backward()
    trainee.reduce_gradients()
    if not finite.read():
        raise TrainingError(
            f"the loss of step {step} is {reduced[0].item()} on at least one rank; the weights were not changed. Go back "
            f"to an earlier checkpoint with a lower optimizer.learning_rate_per_256, or set optimizer.clip_gradient_norm"
        )
    gradient_norm = None
    if config.optimizer.clip_gradient_norm is not None:
        parameters = trainee.method.parameters()
        gradient_norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_gradient_norm)
    trainee.optimizer.step()
    return StepMetrics(
        loss=reduced[0],
        gradient_norm=gradient_norm,
        selection=selection,
        scores_BP=scores_BP,
        embeddings=result.embeddings,
        stop_requested=reduced[1],
    )


def _score(trainee: Trainee, pixels_VB: Tensor, config: RunConfig) -> Tensor:
    views_VB = resize_for_scoring(normalise_views(pixels_VB, config.views), config.selection.scoring_resolution_px)
    with _autocast(config, trainee.device):
        return score_views(
            trainee.score, views_VB, module=trainee.method, batch_norm=config.selection.scoring_batch_norm
        )


def resize_for_scoring(
    views_VB: Float[Tensor, "views batch channels height width"], resolution_px: int | None
) -> Float[Tensor, "views batch channels small_height small_width"]:
    """Scale views down, antialiased, on the device; None or the same size leaves them as they are."""
    if resolution_px is None or resolution_px == views_VB.shape[-1]:
        return views_VB
    small = F.interpolate(
        views_VB.flatten(0, 1),
        size=(resolution_px, resolution_px),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    return small.unflatten(0, views_VB.shape[:2])


def _autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.training.precision == "bfloat16")


def _seed_torch(config: RunConfig, purpose: Purpose, step: int, rank: int) -> None:
    """Address dropout and drop path by (seed, step, rank, purpose): no state to save, nothing spills between passes."""
    torch.manual_seed(draw_torch_seed(seed=config.run.seed, purpose=purpose, step=step, rank=rank))


class _AsyncFlag:
    """A boolean of the device, copied to the host while the device goes on working."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag
        self._copied: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._flag = host.copy_(flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        """Wait for the copy only, not for the backward pass queued behind it."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag)
