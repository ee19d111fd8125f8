"""Fine-tune: train encoder and linear classifier together on labelled images.

Legend: N images, S pixels, B images of a step.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from hvp_ray.config import TransformConfig, ViewsConfig
from hvp_ray.errors import ConfigError, ShapeError, TrainingError
from hvp_ray.evaluation.features import extract_features
from hvp_ray.evaluation.linear import INITIAL_DEVIATION, ProbePart
from hvp_ray.methods.backbones import feature_dim
from hvp_ray.randomness import Purpose, draw_stream, draw_torch_seed, permutation_from_words
from hvp_ray.views.normalise import normalise_views


@dataclass(frozen=True, slots=True, eq=False)
class LabelledPixels:
    """Centre crops with their labels."""

    pixels: NDArray[np.uint8]
    """[N, S, S, C]."""
    labels: NDArray[np.int64]
    """[N], 0 or more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuneSettings:
    """Settings of `fine_tune`."""

    epochs: int = 30
    """Passes over the training images."""
    learning_rate_per_256: float = 5e-4
    """Learning rate for 256 images of a step: one value for all data sets, not chosen on test images."""
    weight_decay: float = 0.05
    """Weight decay of all parameters."""
    images_per_step: int = 256
    """B, cut to N."""
    seed: int = 0
    """Seed of head, order, crops and dropout."""

    def __post_init__(self) -> None:
        epochs, images_per_step, learning_rate_per_256 = self.epochs, self.images_per_step, self.learning_rate_per_256
        if epochs < 1 or images_per_step < 2 or learning_rate_per_256 <= 0.0:
            raise ConfigError(
                f"{epochs=} must be 1 or more, {images_per_step=} 2 or more, {learning_rate_per_256=} positive"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FineTuneResult:
    """Result of `fine_tune`, after the last epoch."""

    correct: NDArray[np.bool_]
    """[M], for each test image."""
    losses: tuple[float, ...]
    """Mean training loss of every epoch."""

    @property
    def accuracy(self) -> float:
        """Top-1 on the test images, in [0, 1]."""
        return float(self.correct.mean())


def fine_tune(
    backbone: nn.Module,
    training: LabelledPixels,
    test: LabelledPixels,
    views: ViewsConfig,
    settings: FineTuneSettings,
    device: torch.device,
) -> FineTuneResult:
    """Train a copy of the encoder with a linear head by AdamW, cosine to 0; test it after the last epoch.

    Training images are cropped and flipped by `views.global_views.even` (digits are never flipped), test images are
    not. The last images of an epoch that do not fill a step are left out. Random numbers are addressed by (seed, step);
    torch's global generators are restored.

    Args:
        backbone: the encoder; it is not changed.
        training: N images.
        test: M images.
        views: crops, flips, mean and standard deviation.
        settings: see `FineTuneSettings`.
        device: device to train on.

    Raises:
        ShapeError: fewer than two training images, no test image, or a negative label.
        TrainingError: the loss is not finite at the end.

    Source: automl/hvp run_pipeline.py (AdamW, weight decay 0.05, cosine, rate x B / 256).
    Differs: its rate is set per data set (5e-6 to 5e-4, for 100 to 300 epochs at 224 px). Crops come from the centre crop
        rather than from the whole image, and a crop that would stick out is made smaller instead of redrawn.
    """
    counts = [len(training.pixels), len(training.labels), len(test.pixels), len(test.labels)]
    if counts[0] < 2 or counts[0] != counts[1] or not counts[2] or counts[2] != counts[3]:
        raise ShapeError(
            "expected two training images and a test image or more, all labelled; got "
            "{} with {} labels and {} with {}".format(*counts)
        )
    if min(training.labels.min(), test.labels.min()) < 0:
        raise ShapeError("labels: expected 0 or more; leave unlabelled images out")
    torch_seed = draw_torch_seed(seed=settings.seed, purpose=Purpose.PROBE, step=ProbePart.FINE_TUNING, rank=0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(torch_seed)  # of the head, and of dropout and stochastic depth
        head = nn.Linear(feature_dim(backbone), int(training.labels.max()) + 1)
        nn.init.normal_(head.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(head.bias)
        encoder, head = copy.deepcopy(backbone).to(device).train(), head.to(device)
        encoder.requires_grad_()
        losses = _train(nn.Sequential(encoder, head), training, views, settings, device)
    remedy = f"use a lower --learning_rate than {settings.learning_rate_per_256:g}"
    if not math.isfinite(losses[-1]):
        raise TrainingError(f"fine-tuning diverged: its loss in the last epoch is {losses[-1]}; {remedy}")
    try:
        features = extract_features(encoder, test.pixels, views, device=device)
    except TrainingError as error:
        raise TrainingError(f"fine-tuning diverged: its features are not finite numbers; {remedy}") from error
    with torch.no_grad():
        correct = head(features).argmax(dim=1).cpu().numpy() == test.labels
    return FineTuneResult(correct=correct, losses=losses)


def _train(
    network: nn.Module, training: LabelledPixels, views: ViewsConfig, settings: FineTuneSettings, device: torch.device
) -> tuple[float, ...]:
    seed, num_images = settings.seed, len(training.pixels)
    size = min(settings.images_per_step, num_images)
    steps_per_epoch = num_images // size
    base = settings.learning_rate_per_256 * size / 256
    optimizer = torch.optim.AdamW(network.parameters(), lr=base, weight_decay=settings.weight_decay)
    losses = []
    for epoch in range(settings.epochs):
        words = draw_stream(seed=seed, purpose=Purpose.PROBE, index=epoch, epoch=ProbePart.ORDER, num_words=num_images)
        order = permutation_from_words(words)
        total = torch.zeros((), device=device)
        for step_of_epoch in range(steps_per_epoch):
            step = epoch * steps_per_epoch + step_of_epoch
            rows = order[step_of_epoch * size : (step_of_epoch + 1) * size]
            rate = base * 0.5 * (1.0 + math.cos(math.pi * step / (settings.epochs * steps_per_epoch)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch_seed = draw_torch_seed(
                seed=seed, purpose=Purpose.PROBE, step=ProbePart.FINE_TUNING, rank=step + 1
            )  # 0 is the head's
            images = normalise_views(torch.from_numpy(training.pixels[rows]).to(device), views)
            images = crop_and_flip(images, views.global_views.even, torch.Generator().manual_seed(torch_seed))
            loss = F.cross_entropy(network(images), torch.from_numpy(training.labels[rows]).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        losses.append(float(total) / steps_per_epoch)
    return tuple(losses)


def crop_and_flip(
    images: Float[Tensor, "batch channels size size"], transform: TransformConfig, generator: torch.Generator
) -> Float[Tensor, "batch channels size size"]:
    """Cut a random box out of each image, enlarge it to the image's size (bilinear), and flip some.

    Boxes have the area and aspect ratio of RandomResizedCrop; a side longer than the image is cut to the image.
    """
    uniform = torch.rand(len(images), 5, generator=generator)
    low, high = transform.crop_scale
    area = low + (high - low) * uniform[:, 0]
    log_low, log_high = (math.log(ratio) for ratio in transform.crop_ratio)
    ratio = (log_low + (log_high - log_low) * uniform[:, 1]).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    # affine_grid's coordinates go from -1 to 1 over the image; a box of half size w around x stays inside.
    centre_x, centre_y = (1 - width) * (2 * uniform[:, 2] - 1), (1 - height) * (2 * uniform[:, 3] - 1)
    flip = torch.where(uniform[:, 4] < transform.flip_probability, -1.0, 1.0)
    zero = torch.zeros_like(width)
    theta = torch.stack([width * flip, zero, centre_x, zero, height, centre_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
