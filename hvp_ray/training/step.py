"""One training step of Hard View Pretraining, on one page: score -> choose -> gather -> train -> update.

Legend: V global views, L local views, B images, P pairs, S slots trained on, k local views trained on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hvp_ray.config import RULES_THAT_SCORE, RunConfig
from hvp_ray.errors import TrainingError
from hvp_ray.methods.method import Contrast, Method, MethodLoss, ViewTensors
from hvp_ray.randomness import Purpose, draw_torch_seed
from hvp_ray.records import ViewBatch
from hvp_ray.selection import Candidates, CandidateScores, Selection, choose_views, score_views
from hvp_ray.selection.scoring import batch_norm_for_scoring
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.training.choosing import candidates_of, draw_candidates, draw_random_locals, draw_random_pairs, pair_ious
from hvp_ray.training.optimizers import clip_gradients
from hvp_ray.training.pixel_views import PixelViews
from hvp_ray.training.stages import Stage, name_for_profiler


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What a step measured; tensors stay on the device until they are reported."""

    loss: Float[Tensor, ""]
    """Mean over all ranks."""
    gradient_norm: Float[Tensor, ""] | None
    """Before clipping; None: not computed."""
    candidates: Candidates
    selection: Selection
    scores: CandidateScores | None
    """Loss that each candidate would have given; None: the step did not score."""
    embeddings: Float[Tensor, "batch dim"]
    measurements: dict[str, Float[Tensor, ""]]
    """What the method measured on this rank."""
    stop_requested: bool
    """Some rank was asked to stop; every rank has the same value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainee:
    """The parts of a model in training that a step needs."""

    method: Method
    """The bare method: parameters, scoring."""
    training_forward: Callable[..., MethodLoss]
    """The method's forward as it is trained: wrapped, perhaps compiled."""
    score: Callable[[ViewTensors, Candidates], CandidateScores]
    """The method's `score`, perhaps compiled."""
    reduce_gradients: Callable[[], None]
    without_reduction: Callable[[], AbstractContextManager[None]]
    """See `distributed.wrap.WrappedMethod`."""
    optimizer: torch.optim.Optimizer
    mean_over_ranks: Callable[[Tensor], Tensor]
    device: torch.device
    rank: int
    stage: Callable[[Stage], AbstractContextManager[None]] = name_for_profiler
    """Entered around each part of a step."""


def train_step(trainee: Trainee, batch: DeviceBatch, config: RunConfig, *, stop_requested: bool = False) -> StepMetrics:
    """Score the views with the current weights, choose a candidate for each image, and train on it.

    Raises:
        TrainingError: the loss is not finite on some rank; raised on every rank, before the update.
    """
    with trainee.stage("hand_over"):
        batch.wait()
    chosen = choose_step_views(trainee, batch, config)
    trained = forward_backward(trainee, chosen.pixels, config, batch.batch.step, stop_requested=stop_requested)
    is_finite, stops = trained.flags.read()
    if not is_finite:
        raise TrainingError(
            f"the loss of step {batch.batch.step} is {trained.loss.item()} on at least one rank; the weights were not "
            f"changed. Go back to an earlier checkpoint with a lower optimizer.learning_rate_per_256, or set "
            f"optimizer.clip_gradient_norm"
        )
    gradient_norm = update_weights(trainee, trained, config)
    return StepMetrics(
        loss=trained.loss,
        gradient_norm=gradient_norm,
        candidates=chosen.candidates,
        selection=chosen.selection,
        scores=chosen.scores,
        embeddings=torch.cat([result.embeddings for result in trained.results]),
        measurements=_mean_of_parts([result.measurements for result in trained.results]),
        stop_requested=stops,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenViews:
    """What a step trains on, and why."""

    candidates: Candidates
    scores: CandidateScores | None
    selection: Selection
    pixels: PixelViews


def choose_step_views(trainee: Trainee, batch: DeviceBatch, config: RunConfig) -> ChosenViews:
    """Score the candidates, choose one for each image, and gather its views."""
    trainee.optimizer.zero_grad(set_to_none=True)  # the last step's gradients make room
    pixels = PixelViews.of(batch)
    candidates = candidates_of(config, batch.batch.step)
    rule = config.selection.rule if config.selection.is_hard_step(batch.batch.step) else "first"
    scores = None
    if rule in RULES_THAT_SCORE or config.selection.score_always:
        scores = score_candidates(trainee, pixels, candidates, config, batch.batch.step)
        if _training_may_reuse(config):
            pixels = replace(pixels, reusable=scores.reusable)
        scores = replace(scores, reusable={})  # its memory is free when the chosen views' part has been taken
    with trainee.stage("choose"):
        selection = _choose(trainee, batch.batch, candidates, scores, config)
    with trainee.stage("gather"):
        chosen = pixels.gather(selection)
    return ChosenViews(candidates=candidates, scores=scores, selection=selection, pixels=chosen)


def score_candidates(
    trainee: Trainee, pixels: PixelViews, candidates: Candidates, config: RunConfig, step: int
) -> CandidateScores:
    """Score all candidates with the current weights, part by part, as `config.selection` says."""
    selection = config.selection
    precision = config.training.precision if selection.scoring_precision == "training" else selection.scoring_precision
    _seed_torch(config, Purpose.TORCH_SCORING, step, trainee.rank)
    scores = []
    for part in pixels.split(config.training.accumulation_steps):
        with trainee.stage("downscale"):
            small = part.for_scoring(config, patch_px=trainee.method.patch_px)
        with trainee.stage("normalise"):
            views = small.normalised(config)
        with trainee.stage("score"), _autocast(precision, trainee.device):
            scores.append(
                score_views(
                    trainee.score,
                    views,
                    candidates,
                    module=trainee.method,
                    batch_norm=selection.scoring_batch_norm,
                )
            )
    if len(scores) == 1:
        return scores[0]
    of_locals = [of_part.locals_BPL for of_part in scores if of_part.locals_BPL is not None]
    return CandidateScores(
        pairs_BP=torch.cat([of_part.pairs_BP for of_part in scores]),
        locals_BPL=torch.cat(of_locals) if of_locals else None,
        reusable={name: torch.cat([part.reusable[name] for part in scores], dim=1) for name in scores[0].reusable},
    )


def _training_may_reuse(config: RunConfig) -> bool:
    """Tell whether scoring forwards the views just as training will."""
    selection = config.selection
    full_resolution = selection.scoring_resolution_px in (None, config.views.global_views.size_px)
    same_precision = selection.scoring_precision in ("training", config.training.precision)
    return selection.reuse_teacher and full_resolution and same_precision


def _choose(
    trainee: Trainee, batch: ViewBatch, candidates: Candidates, scores: CandidateScores | None, config: RunConfig
) -> Selection:
    selection, seed, device = config.selection, config.run.seed, trainee.device
    rule = selection.rule if selection.is_hard_step(batch.step) else "first"
    draws_locals = rule == "random" and candidates.num_chosen_local_views > 0
    return choose_views(
        rule,
        candidates,
        num_images=len(batch.sample_ids),
        device=device,
        scores=scores,
        drawn=draw_candidates(candidates, selection.limit, seed=seed, step=batch.step, rank=trainee.rank)
        if rule in RULES_THAT_SCORE
        else None,
        iou_BP=pair_ious(batch, candidates, device) if rule == "min_iou" else None,
        random_pairs=draw_random_pairs(batch, candidates, seed, device) if rule == "random" else None,
        random_locals=draw_random_locals(batch, candidates, seed, device) if draws_locals else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedViews:
    """Forward and backward of a step: gradients are in place."""

    results: list[MethodLoss]
    loss: Float[Tensor, ""]
    flags: "_AsyncFlags"
    """Whether the loss is finite, and whether some rank was asked to stop."""


def forward_backward(
    trainee: Trainee, chosen: PixelViews, config: RunConfig, step: int, *, stop_requested: bool
) -> TrainedViews:
    """Forward and backward on the chosen views, part by part; gradients are means over all parts and ranks."""
    parts = chosen.split(config.training.accumulation_steps)
    features = _contrast_features(trainee, parts, config, step)
    trainee.optimizer.zero_grad(set_to_none=True)
    results: list[MethodLoss] = []
    for part, of_part in enumerate(parts):
        with trainee.stage("normalise"):
            views = of_part.normalised(config)
        is_last = part == len(parts) - 1
        _seed_torch(config, Purpose.TORCH_TRAINING, step, trainee.rank, part)
        with nullcontext() if is_last else trainee.without_reduction():
            with trainee.stage("forward"), _autocast(config.training.precision, trainee.device):
                if features is None:
                    results.append(trainee.training_forward(views))
                else:
                    results.append(trainee.training_forward(views, Contrast(features=features, part=part)))
            if is_last:  # asked before the last backward, so that a GPU's host need not wait for that
                stop = torch.full((), float(stop_requested), device=trainee.device)
                loss = torch.stack([result.loss.detach().float() for result in results]).mean()
                with trainee.stage("collectives"):
                    reduced = trainee.mean_over_ranks(torch.stack([loss, stop]))
                flags = _AsyncFlags(torch.stack([torch.isfinite(reduced[0]), reduced[1] > 0.0]))
            with trainee.stage("backward"):
                (results[-1].loss / len(parts)).backward()
    with trainee.stage("collectives"):
        trainee.reduce_gradients()
    return TrainedViews(results=results, loss=reduced[0], flags=flags)


def update_weights(trainee: Trainee, trained: TrainedViews, config: RunConfig) -> Tensor | None:
    """Clip, update, and let the method follow (teacher, centre); return the norm of the gradient before clipping."""
    statistics = _mean_of_parts([result.statistics for result in trained.results])
    with trainee.stage("collectives"):
        statistics = _mean_over_ranks(statistics, trainee)
    with trainee.stage("update"):
        gradient_norm = clip_gradients(trainee.method, config.optimizer)
        trainee.method.before_update()
        trainee.optimizer.step()
        trainee.method.after_update(statistics)
    return gradient_norm


def _contrast_features(trainee: Trainee, parts: list[PixelViews], config: RunConfig, step: int) -> Tensor | None:
    """Forward all parts once without gradient, where a part's loss needs the others; None: it does not."""
    if len(parts) == 1:
        return None
    features = []
    with torch.no_grad(), batch_norm_for_scoring(trainee.method, "batch"):
        for part, of_part in enumerate(parts):
            _seed_torch(config, Purpose.TORCH_TRAINING, step, trainee.rank, part)
            with trainee.stage("forward"), _autocast(config.training.precision, trainee.device):
                of_images = trainee.method.contrast_features(of_part.normalised(config))
            if of_images is None:
                return None
            features.append(of_images)
    return torch.stack(features)


def _mean_of_parts(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(values) == 1:
        return values[0]
    return {name: torch.stack([of_part[name] for of_part in values]).mean(dim=0) for name in values[0]}


def _mean_over_ranks(values: dict[str, Tensor], trainee: Trainee) -> dict[str, Tensor]:
    """Average all values over the ranks in one collective."""
    if not values:
        return values
    flat = trainee.mean_over_ranks(torch.cat([value.float().flatten() for value in values.values()]))
    pieces = flat.split([value.numel() for value in values.values()])
    return {name: piece.view_as(value) for (name, value), piece in zip(values.items(), pieces, strict=True)}


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def _seed_torch(config: RunConfig, purpose: Purpose, step: int, rank: int, part: int = 0) -> None:
    """Address dropout and drop path by (seed, purpose, step, rank, part): no state to save, nothing spills over."""
    torch.manual_seed(draw_torch_seed(seed=config.run.seed, purpose=purpose, step=step, rank=rank, part=part))


class _AsyncFlags:
    """Booleans of the device, copied to the host while the device goes on working."""

    def __init__(self, flags: Tensor) -> None:
        self._flags = flags
        self._copied: torch.cuda.Event | None = None
        if flags.device.type == "cuda":
            host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            self._flags = host.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(flags.device))

    def read(self) -> list[bool]:
        """Wait for the copy only, not for the backward pass queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        flags: list[bool] = self._flags.tolist()
        return flags
