"""One training step of Hard View Pretraining, on one page: score -> choose -> gather -> train -> update.

Legend: V global views, L local views, B images, P pairs, S slots trained on, k local views trained on.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hvp_ray.config import OptimizerConfig, RunConfig
from hvp_ray.errors import TrainingError
from hvp_ray.host_to_device import to_device
from hvp_ray.methods.method import Contrast, MethodLoss
from hvp_ray.randomness import Purpose, draw_torch_seed
from hvp_ray.selection import (
    Candidates,
    CandidateScores,
    Draw,
    KeptViews,
    Reusable,
    Selection,
    StepSelection,
    choose_views,
    pair_weights_of,
    score_views,
)
from hvp_ray.selection.proposals import pair_features, probe_statistics
from hvp_ray.selection.scoring import batch_norm_for_scoring
from hvp_ray.stream.device import DeviceBatch
from hvp_ray.training.optimizers import clip_gradients
from hvp_ray.training.pixel_views import PixelViews
from hvp_ray.training.trainee import Trainee


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """The measurements of a step; tensors stay on the device until they are recorded."""

    loss: Float[Tensor, ""]
    """Mean over all ranks."""
    gradient_norm: Float[Tensor, ""] | None
    """Before clipping; None: not computed."""
    candidates: Candidates
    selection: Selection
    scores: CandidateScores | None
    """Loss that each candidate would give; None: the step did not score."""
    embeddings: Float[Tensor, "batch dim"]
    measurements: dict[str, Float[Tensor, ""]]
    """The method's own metrics on this rank, and those of the predictor."""
    stop_requested: bool
    """Whether any rank was asked to stop; equal on all ranks."""


def train_step(
    trainee: Trainee,
    batch: DeviceBatch,
    config: RunConfig,
    of_step: StepSelection,
    *,
    stop_requested: bool = False,
) -> StepMetrics:
    """Score the views with the current weights, choose a candidate for each image, and train on it.

    Args:
        trainee: the model.
        batch: views of the step.
        config: the run.
        of_step: the selection that the views were rendered for; see `selection_at`.
        stop_requested: this rank was asked to stop.

    Raises:
        TrainingError: the loss is not finite on some rank; raised on every rank, before the update.
    """
    with trainee.stage("copy"):
        batch.wait()
    chosen = choose_step_views(trainee, batch, config, of_step)
    probed = probe_plans(trainee, batch, config, of_step)
    trained = forward_backward(
        trainee, chosen.pixels, config, batch.step, stop_requested=stop_requested, ramp_position=of_step.ramp_position
    )
    is_finite, stops = trained.flags.read().tolist()
    if not is_finite:
        raise TrainingError(
            f"the loss of step {batch.step} is {trained.loss.item()} on at least one rank, and a finite loss was expected; "
            f"the weights were not changed. Continue from an earlier checkpoint with a lower "
            f"optimizer.learning_rate_per_256, or set optimizer.clip_gradient_norm"
        )
    gradient_norm = update_weights(trainee, trained, config.optimizer)
    measurements = _mean_of_parts([result.measurements for result in trained.results])
    if trainee.predictor is not None:
        trainee.predictor.end_step(None if probed is None else probed.read().numpy())
        measurements = measurements | {"selection/predictor_r2": torch.tensor(trainee.predictor.r2)}
    return StepMetrics(
        loss=trained.loss,
        gradient_norm=gradient_norm,
        candidates=chosen.candidates,
        selection=chosen.selection,
        scores=chosen.scores,
        embeddings=torch.cat([result.embeddings for result in trained.results]),
        measurements=measurements,
        stop_requested=stops,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenViews:
    """The views that a step trains on, and the scores that they were chosen by."""

    candidates: Candidates
    scores: CandidateScores | None
    selection: Selection
    pixels: PixelViews


def choose_step_views(trainee: Trainee, batch: DeviceBatch, config: RunConfig, of_step: StepSelection) -> ChosenViews:
    """Score the candidates if the step needs it, choose one for each image, and gather its views."""
    trainee.optimizer.zero_grad(set_to_none=True)  # frees the last step's gradients before scoring
    pixels = PixelViews.of(batch)
    candidates = of_step.candidates(config.views)
    scores: CandidateScores | None = None
    reusable: Reusable = {}
    if of_step.needs_scores:
        scores = score_candidates(trainee, pixels, candidates, config, batch.step)
        reusable = _reusable_in_training(scores, config)
        scores = replace(scores, reusable={})
    with trainee.stage("choose"):
        selection = choose_views(
            of_step.rule,
            candidates,
            num_images=len(batch.sample_ids),
            device=trainee.device,
            quantile=of_step.quantile,
            scores=scores,
            plan=batch.global_views.plan,
            draw=Draw(
                seed=config.run.seed,
                step=batch.step,
                rank=trainee.rank,
                epoch=batch.epoch,
                sample_ids=batch.sample_ids,
            ),
        )
    with trainee.stage("gather"):
        chosen = pixels.gather(selection, reusable)
    return ChosenViews(candidates=candidates, scores=scores, selection=selection, pixels=chosen)


def score_candidates(
    trainee: Trainee,
    pixels: PixelViews,
    candidates: Candidates,
    config: RunConfig,
    step: int,
    *,
    is_probe: bool = False,
) -> CandidateScores:
    """Score all candidates with the current weights, in `training.accumulation_steps` parts.

    A probe is not trained on, so it is scored in one part, moves no running statistics of BatchNorm, and keeps no rows for
    `selection.reuse_student`.
    """
    selection = config.selection
    is_faithful = selection.scoring_batch_norm == "faithful"
    precision = config.training.precision if selection.scoring_precision == "training" else selection.scoring_precision
    _seed_torch(config, Purpose.TORCH_SCORING, step, trainee.rank)
    scores = []
    for part in pixels.split(1 if is_probe else config.training.accumulation_steps):
        with trainee.stage("downscale"):
            small = part.for_scoring(selection, config.views, patch_px=trainee.method.patch_px)
        with trainee.stage("normalise"):
            views = replace(small.normalised(config.views), keep_rows=selection.reuse_student and not is_probe)
        with trainee.stage("score"), _autocast(precision, trainee.device):
            scores.append(
                score_views(
                    trainee.score,
                    views,
                    candidates,
                    module=trainee.method,
                    batch_norm="batch" if is_faithful and is_probe else selection.scoring_batch_norm,
                )
            )
    return CandidateScores.joined(scores)


def probe_plans(trainee: Trainee, batch: DeviceBatch, config: RunConfig, of_step: StepSelection) -> "_AsyncCopy | None":
    """Score all pairs of the probe views; return `probe_statistics` as means over the ranks. None: the step has no probe."""
    if not of_step.num_probe_images:
        return None
    assert batch.probe_views is not None
    plan = batch.probe_views.plan
    candidates = Candidates(num_views=plan.num_views, alternating=config.views.slots_keep_transforms)
    scores = score_candidates(trainee, PixelViews.of_probes(batch), candidates, config, batch.step, is_probe=True)
    heights, widths = (sizes[: plan.num_images] for sizes in (batch.heights, batch.widths))
    features = to_device(pair_features(plan, heights, widths, candidates.pairs), trainee.device)
    with trainee.stage("collectives"):
        return _AsyncCopy(trainee.mean_over_ranks(probe_statistics(features, scores.pairs_BP)))


def _reusable_in_training(scores: CandidateScores, config: RunConfig) -> Reusable:
    """Return what scoring leaves for training: the student's rows, and the teacher's outputs if `reuse_teacher` is set."""
    if not config.scores_as_in_training:
        return {}
    return {
        name: of_views
        for name, of_views in scores.reusable.items()
        if config.selection.reuse_teacher or isinstance(of_views, KeptViews)
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedViews:
    """The result of forward and backward; the gradients are in the parameters."""

    results: list[MethodLoss]
    loss: Float[Tensor, ""]
    flags: "_AsyncCopy"
    """Two booleans: whether the loss is finite, and whether some rank was asked to stop."""


def forward_backward(
    trainee: Trainee,
    chosen: PixelViews,
    config: RunConfig,
    step: int,
    *,
    stop_requested: bool,
    ramp_position: float = 1.0,
) -> TrainedViews:
    """Forward and backward on the chosen views, part by part; gradients are means over all parts and ranks.

    With rule all_pairs, `ramp_position` goes from the plain mean over the pairs (0) to `selection.weighting` (1).
    """
    parts = chosen.split(config.training.accumulation_steps)
    features = _contrast_features(trainee, parts, config, step)
    trained = Candidates(num_views=len(chosen.global_pixels), alternating=config.views.slots_keep_transforms)
    weigh = pair_weights_of(config.selection, trained, device=trainee.device, ramp_position=ramp_position)
    trainee.optimizer.zero_grad(set_to_none=True)
    results: list[MethodLoss] = []
    for part, of_part in enumerate(parts):
        with trainee.stage("normalise"):
            views = of_part.normalised(config.views)
        is_last = part == len(parts) - 1
        _seed_torch(config, Purpose.TORCH_TRAINING, step, trainee.rank, part)
        with nullcontext() if is_last else trainee.without_reduction():
            with trainee.stage("forward"), _autocast(config.training.precision, trainee.device):
                contrast = None if features is None else Contrast(features=features, part=part)
                results.append(trainee.training_forward(views, contrast, weigh))
            if is_last:  # before the last backward, so that the host of a GPU need not wait for it
                stop = torch.full((), float(stop_requested), device=trainee.device)
                loss = torch.stack([result.loss.detach().float() for result in results]).mean()
                with trainee.stage("collectives"):
                    reduced = trainee.mean_over_ranks(torch.stack([loss, stop]))
                flags = _AsyncCopy(torch.stack([torch.isfinite(reduced[0]), reduced[1] > 0.0]))
            with trainee.stage("backward"):
                (results[-1].loss / len(parts)).backward()
    with trainee.stage("collectives"):
        trainee.reduce_gradients()
    return TrainedViews(results=results, loss=reduced[0], flags=flags)


def update_weights(trainee: Trainee, trained: TrainedViews, config: OptimizerConfig) -> Tensor | None:
    """Clip, update the weights, then teacher and centre; return the gradient's norm before clipping."""
    statistics = _mean_of_parts([result.statistics for result in trained.results])
    with trainee.stage("collectives"):
        statistics = _mean_over_ranks(statistics, trainee)
    with trainee.stage("update"):
        gradient_norm = clip_gradients(trainee.method, config)
        trainee.method.before_update()
        trainee.optimizer.step()
        trainee.method.after_update(statistics)
    return gradient_norm


def _contrast_features(trainee: Trainee, parts: list[PixelViews], config: RunConfig, step: int) -> Tensor | None:
    """Forward all parts once without gradient if a part's loss needs the others; None: it does not."""
    if len(parts) == 1:
        return None
    features = []
    with torch.no_grad(), batch_norm_for_scoring(trainee.method, "batch"):
        for part, of_part in enumerate(parts):
            _seed_torch(config, Purpose.TORCH_TRAINING, step, trainee.rank, part)
            with trainee.stage("forward"), _autocast(config.training.precision, trainee.device):
                of_images = trainee.method.contrast_features(of_part.normalised(config.views))
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
    """Seed dropout and drop path by their address (seed, purpose, step, rank, part), so there is no state to save."""
    torch.manual_seed(draw_torch_seed(seed=config.run.seed, purpose=purpose, step=step, rank=rank, part=part))


class _AsyncCopy:
    """A tensor of the device, copied to the host while the device continues."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """Wait for the copy only, not for the work queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values
