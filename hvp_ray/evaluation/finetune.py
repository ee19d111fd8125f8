"""Fine-tuning: encoder and a linear classifier trained together on labelled images.

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
from hvp_ray.errors import ConfigError, ShapeError
from hvp_ray.evaluation.features import extract_features
from hvp_ray.evaluation.linear import INITIAL_DEVIATION, ProbePart
from hvp_ray.methods.backbones import feature_dim
from hvp_ray.randomness import Purpose, draw_stream, draw_torch_seed, permutation_from_words
from hvp_ray.views.normalise import normalise_views


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FineTuneResult:
    """Result of `fine_tune`."""

    accuracy: float
    """Top-1 on the test images, in [0, 1], behind the last epoch."""
    correct: NDArray[np.bool_]
    """[M], for each test image."""
    losses: tuple[float, ...]
    """Mean training loss of every epoch."""


def fine_tune(
    backbone: nn.Module,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    test_pixels: NDArray[np.uint8],
    test_labels: NDArray[np.int64],
    views: ViewsConfig,
    *,
    device: torch.device,
    epochs: int = 30,
    learning_rate_per_256: float = 5e-4,
    weight_decay: float = 0.05,
    images_per_step: int = 256,
    seed: int = 0,
) -> FineTuneResult:
    """Train a copy of the encoder with a linear head by AdamW, cosine to 0; test behind the last epoch.

    Training images are cropped and flipped as `views.global_views.even` says (digits are never flipped), test images are
    not. The last images of an epoch that do not fill a step are left out. Random numbers are addressed by (seed, step);
    torch's global generators are as they were afterwards.

    Args:
        backbone: the encoder; it is not changed.
        pixels: [N, S, S, 3], centre crops of the training images.
        labels: [N], 0 or more.
        test_pixels: [M, S, S, 3].
        test_labels: [M].
        views: crops, flips, mean and standard deviation.
        device: where to train.
        epochs: passes over the training images.
        learning_rate_per_256: for 256 images of a step. One value for all data sets, not chosen on test images.
        weight_decay: of all parameters.
        images_per_step: B, cut to N.
        seed: of head, order, crops and dropout.

    Raises:
        ConfigError: a setting is out of range.
        ShapeError: fewer than two training images, no test image, or a negative label.

    Source: automl/hvp run_pipeline.py (AdamW, weight decay 0.05, cosine, rate x B / 256).
    Differs: its rate is set per data set (5e-6 to 5e-4, for 100 to 300 epochs at 224 px); crops come from the centre crop
        rather than from the whole image, and a crop that would stick out is made smaller instead of drawn again.
    """
    if epochs < 1 or images_per_step < 2 or learning_rate_per_256 <= 0.0:
        raise ConfigError(
            f"{epochs=} must be 1 or more, {images_per_step=} 2 or more, {learning_rate_per_256=} positive"
        )
    if len(pixels) < 2 or len(pixels) != len(labels) or not len(test_pixels) or len(test_pixels) != len(test_labels):
        raise ShapeError(
            "expected two training images and a test image or more, all labelled; got "
            f"{len(pixels)} with {len(labels)} labels and {len(test_pixels)} with {len(test_labels)}"
        )
    if min(labels.min(), test_labels.min()) < 0:
        raise ShapeError("labels: expected 0 or more; leave unlabelled images out")
    torch_seed = draw_torch_seed(seed=seed, purpose=Purpose.PROBE, step=ProbePart.FINE_TUNING, rank=0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(torch_seed)  # of the head, and of dropout and stochastic depth
        head = nn.Linear(feature_dim(backbone), int(labels.max()) + 1)
        nn.init.normal_(head.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(head.bias)
        encoder, head = copy.deepcopy(backbone).to(device).train(), head.to(device)
        encoder.requires_grad_()
        losses = _train(
            nn.Sequential(encoder, head), pixels, labels, views, device, epochs=epochs, seed=seed,
            learning_rate=learning_rate_per_256, weight_decay=weight_decay, images_per_step=images_per_step,
        )  # fmt: skip
    features = extract_features(encoder, test_pixels, views, device=device)
    with torch.no_grad():
        correct = head(features).argmax(dim=1).cpu().numpy() == test_labels
    return FineTuneResult(accuracy=float(correct.mean()), correct=correct, losses=losses)


def _train(
    network: nn.Module,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    views: ViewsConfig,
    device: torch.device,
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    images_per_step: int,
    seed: int,
) -> tuple[float, ...]:
    size = min(images_per_step, len(pixels))
    steps_per_epoch = len(pixels) // size
    base = learning_rate * size / 256
    optimizer = torch.optim.AdamW(network.parameters(), lr=base, weight_decay=weight_decay)
    losses = []
    for epoch in range(epochs):
        words = draw_stream(seed=seed, purpose=Purpose.PROBE, index=epoch, epoch=ProbePart.ORDER, num_words=len(pixels))
        order = permutation_from_words(words)
        total = torch.zeros((), device=device)
        for step_of_epoch in range(steps_per_epoch):
            step = epoch * steps_per_epoch + step_of_epoch
            rows = order[step_of_epoch * size : (step_of_epoch + 1) * size]
            rate = base * 0.5 * (1.0 + math.cos(math.pi * step / (epochs * steps_per_epoch)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch_seed = draw_torch_seed(
                seed=seed, purpose=Purpose.PROBE, step=ProbePart.FINE_TUNING, rank=step + 1
            )  # 0 is the head's
            images = normalise_views(torch.from_numpy(pixels[rows]).to(device), views)
            images = crop_and_flip(images, views.global_views.even, torch.Generator().manual_seed(torch_seed))
            loss = F.cross_entropy(network(images), torch.from_numpy(labels[rows]).to(device))
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

    Area and aspect ratio of the boxes as in RandomResizedCrop; a side longer than the image is cut to it.
    """
    uniform = torch.rand(len(images), 5, generator=generator)
    low, high = transform.crop_scale
    area = low + (high - low) * uniform[:, 0]
    log_low, log_high = (math.log(ratio) for ratio in transform.crop_ratio)
    ratio = (log_low + (log_high - log_low) * uniform[:, 1]).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    # In affine_grid's coordinates the image reaches from -1 to 1, and a box of half size w around x stays inside.
    centre_x, centre_y = (1 - width) * (2 * uniform[:, 2] - 1), (1 - height) * (2 * uniform[:, 3] - 1)
    flip = torch.where(uniform[:, 4] < transform.flip_probability, -1.0, 1.0)
    zero = torch.zeros_like(width)
    theta = torch.stack([width * flip, zero, centre_x, zero, height, centre_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
