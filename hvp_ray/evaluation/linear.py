"""Linear classifiers on frozen features: SGD as in the papers, logistic regression, and few labels.

Hyperparameters (learning rate, C) are chosen on a held-out part of the training features. Only the final classifier sees the
test features. No global random generator is used.

Legend: D features, C classes, L learning rates, B images of a step.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from hvp_ray.errors import ConfigError, DataError, ShapeError
from hvp_ray.evaluation.knn import FEW_SHOT_DRAWS, draw_shots
from hvp_ray.randomness import Purpose, draw_stream, draw_torch_seed, permutation_from_words

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Rates of the sweep, per 256 images. They include the papers' fixed rates: 0.1 (SimSiam, SimCLR on ImageNet) and 30
(SimSiam's CIFAR-10 config). DINO's 0.001 for tokens of a Vision Transformer is close to the edge."""

INVERSE_REGULARISATIONS = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""C of scikit-learn, for features of `_centre_and_scale`: the factor of the summed loss beside half the squared norm of
the weights."""

FEW_LABEL_INVERSE_REGULARISATION = 100.0
"""C with few labels. Accuracies on scanned digits (10 labels per class, 10 draws) with C = 1, 100, 10,000: 0.886, 0.895,
0.891 of the raw pixels. 0.32, 0.53, 0.59 of an encoder of 60 steps, whose features vary along few directions. They were
measured on the test part of the digits, so few-label results on digits are not blind to this constant. Results on other
data are."""

MOMENTUM = 0.9
INITIAL_DEVIATION = 0.01
_MAX_ITERATIONS = 2000


class ProbePart(IntEnum):
    """Second word of the address of random numbers with `Purpose.PROBE`."""

    SHOTS = 0
    HELD_OUT = 1
    ORDER = 2
    INITIAL_WEIGHTS = 3
    FINE_TUNING = 4


@dataclass(frozen=True, slots=True, eq=False)
class ProbeData:
    """Features and labels of training and test images; everything is computed on their device.

    A class that occurs among the test images only is never predicted.

    Raises:
        ShapeError: nothing to train or test on, or a negative label.
    """

    features: Float[Tensor, "train dim"]
    labels: Int64[Tensor, " train"]
    test_features: Float[Tensor, "test dim"]
    test_labels: Int64[Tensor, " test"]

    def __post_init__(self) -> None:
        sides = (("features", self.features, self.labels), ("test_features", self.test_features, self.test_labels))
        for name, rows, truth in sides:
            if not len(rows) or len(rows) != len(truth):
                raise ShapeError(
                    f"{name}: expected one or more rows and as many labels, got {len(rows)} and {len(truth)}"
                )
            if int(truth.min()) < 0:
                raise ShapeError(
                    f"labels of {name}: expected 0 or more, got {int(truth.min())}; leave unlabelled images out"
                )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProbeResult:
    """Results of the final classifier on the test images."""

    correct: NDArray[np.bool_]
    """[M], for each test image."""
    held_out_accuracies: tuple[float, ...]
    """Held-out accuracy of every setting of the sweep, in its order; empty if there was one setting."""

    @property
    def accuracy(self) -> float:
        """Top-1, in [0, 1]."""
        return float(self.correct.mean())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinearProbe(ProbeResult):
    """Result of `linear_probe`, after the last epoch."""

    learning_rate: float
    """Chosen rate per 256 images."""
    weights: Float[Tensor, "dim classes"]
    """Weights of the final classifier, on the CPU."""
    bias: Float[Tensor, " classes"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LogisticProbe(ProbeResult):
    """Result of `logistic_probe`."""

    inverse_regularisation: float
    """Chosen C."""
    has_converged: bool
    """Whether the final fit reached its tolerance."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FewLabelProbe:
    """Result of `few_label_probe`."""

    shots: int
    """Labels per class."""
    correct: NDArray[np.bool_]
    """[draws, M]."""

    @property
    def accuracy(self) -> float:
        """Mean over draws and test images, in [0, 1]."""
        return float(self.correct.mean())

    @property
    def draw_accuracies(self) -> NDArray[np.float64]:
        """[draws]: accuracy of each draw; their spread shows how much the choice of labelled images matters."""
        return self.correct.mean(axis=1)

    @property
    def mean_correct(self) -> NDArray[np.float64]:
        """[M]: share of the draws that classify a test image correctly."""
        return self.correct.mean(axis=0)


def hold_out(
    labels: NDArray[np.int64], fraction: float, *, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into (kept, held out), both ascending. Hold out `fraction` of every class, a fixed pseudo-random choice.

    A class of two or more has at least one row on either side; a class of one is kept.

    Raises:
        ConfigError: the fraction is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"held_out_fraction={fraction} is not allowed: between 0 and 1")
    words = draw_stream(seed=seed, purpose=Purpose.PROBE, index=0, epoch=ProbePart.HELD_OUT, num_words=len(labels))
    shuffled = permutation_from_words(words)
    # Stable: rows of a class stay in shuffled order.
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    is_held_out = np.zeros(len(labels), dtype=np.bool_)
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        given = min(max(1, round(fraction * count)), count - 1)
        is_held_out[by_class[start : start + given]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def linear_probe(
    data: ProbeData,
    *,
    epochs: int = 100,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    images_per_step: int = 256,
    held_out_fraction: float = 0.1,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear classifier by SGD on frozen features; sweep its learning rate on held-out training features.

    Momentum 0.9, no weight decay, cosine to 0 over all steps, weights from N(0, 0.01), bias 0. All rates are trained at
    once, from the same weights and on the same batches; on a tie the smallest rate wins. The chosen rate is then trained on
    all training features. Features are neither standardised nor normalised, as in the papers: the sweep finds the rate that
    fits their scale.

    Args:
        data: features and labels.
        epochs: passes over the training features.
        learning_rates: rates per 256 images of a step.
        images_per_step: B; the last step of an epoch takes what is left.
        held_out_fraction: share of every class that rates are compared on.
        seed: seed of the initial weights, the order and the held-out part.

    Raises:
        ConfigError: a setting is out of range.
        DataError: no class has two images, so that no rate can be chosen.

    Source: HVP paper and automl/hvp eval_linear.py (SGD 0.9, no decay, cosine, N(0, 0.01)).
    Differs: no augmentation of the training images (features are computed once). The reference reports the best epoch on
        the test set and has one fixed rate per data set. Here neither is chosen on test images.
    """
    if epochs < 1 or images_per_step < 1:
        raise ConfigError(f"{epochs=} and {images_per_step=} must be 1 or more")
    if not learning_rates or min(learning_rates) <= 0.0:
        raise ConfigError(f"{learning_rates=} is not allowed: one or more positive rates")
    train = partial(_train_sgd, data, epochs=epochs, images_per_step=images_per_step, seed=seed)

    def accuracies(kept: NDArray[np.int64], held_out: NDArray[np.int64]) -> list[float]:
        rows = torch.from_numpy(held_out).to(data.features.device)
        is_correct = _correct(*train(learning_rates, kept), data.features[rows], data.labels[rows])
        return is_correct.double().mean(dim=1).tolist()

    chosen, held_out_accuracies = _sweep(learning_rates, data.labels, accuracies, held_out_fraction, seed)
    weights, bias = train((chosen,), np.arange(len(data.labels), dtype=np.int64))
    return LinearProbe(
        correct=_correct(weights, bias, data.test_features, data.test_labels)[0].cpu().numpy(),
        learning_rate=chosen,
        held_out_accuracies=held_out_accuracies,
        weights=weights[0].cpu(),
        bias=bias[0].cpu(),
    )


def _train_sgd(
    data: ProbeData,
    rates: tuple[float, ...],
    rows: NDArray[np.int64],
    *,
    epochs: int,
    images_per_step: int,
    seed: int,
) -> tuple[Float[Tensor, "rates dim classes"], Float[Tensor, "rates classes"]]:
    """Train a classifier for each rate on these training rows; return weights and biases."""
    device, dtype = data.features.device, torch.promote_types(data.features.dtype, torch.float32)
    num_classes = int(data.labels.max()) + 1
    torch_seed = draw_torch_seed(seed=seed, purpose=Purpose.PROBE, step=ProbePart.INITIAL_WEIGHTS, rank=0)
    generator = torch.Generator().manual_seed(torch_seed)
    initial = torch.randn(data.features.shape[1], num_classes, generator=generator) * INITIAL_DEVIATION
    weights_LDC = initial.to(device, dtype).expand(len(rates), -1, -1).clone()
    bias_LC = torch.zeros(len(rates), num_classes, device=device, dtype=dtype)
    weights_velocity, bias_velocity = torch.zeros_like(weights_LDC), torch.zeros_like(bias_LC)
    base = torch.tensor(rates, device=device, dtype=dtype) * (images_per_step / 256)
    num_steps = epochs * math.ceil(len(rows) / images_per_step)
    step = 0
    for epoch in range(epochs):
        words = draw_stream(seed=seed, purpose=Purpose.PROBE, index=epoch, epoch=ProbePart.ORDER, num_words=len(rows))
        order = torch.from_numpy(rows[permutation_from_words(words)]).to(device)
        for batch in order.split(images_per_step):
            inputs_BD = data.features[batch].to(dtype)
            errors_LBC = (inputs_BD @ weights_LDC + bias_LC[:, None]).softmax(dim=-1)
            errors_LBC -= F.one_hot(data.labels[batch], num_classes)
            errors_LBC /= len(batch)  # the gradient of the mean cross-entropy by the logits
            weights_velocity.mul_(MOMENTUM).add_(inputs_BD.T @ errors_LBC)
            bias_velocity.mul_(MOMENTUM).add_(errors_LBC.sum(dim=1))
            rate = base * (0.5 * (1.0 + math.cos(math.pi * step / num_steps)))
            weights_LDC -= rate[:, None, None] * weights_velocity
            bias_LC -= rate[:, None] * bias_velocity
            step += 1
    return weights_LDC, bias_LC


def _correct(
    weights_LDC: Float[Tensor, "rates dim classes"],
    bias_LC: Float[Tensor, "rates classes"],
    features: Float[Tensor, "images dim"],
    labels: Int64[Tensor, " images"],
) -> Bool[Tensor, "rates images"]:
    """Tell for each rate and image whether it is classified correctly; logits that are not finite are wrong."""
    parts = []
    for chunk, truth in zip(features.split(1024), labels.split(1024), strict=True):
        logits = chunk.to(weights_LDC.dtype) @ weights_LDC + bias_LC[:, None]
        parts.append((logits.argmax(dim=-1) == truth) & logits.isfinite().all(dim=-1))
    return torch.cat(parts, dim=1)


def logistic_probe(
    data: ProbeData,
    *,
    inverse_regularisations: tuple[float, ...] = INVERSE_REGULARISATIONS,
    held_out_fraction: float = 0.1,
    seed: int = 0,
) -> LogisticProbe:
    """Fit scikit-learn's logistic regression on the CPU; choose C on held-out training features. For small sets.

    The problem is convex, so no rate, order or length of training matters: a check on `linear_probe`, and better than it
    with few images. On a tie the smallest C wins. Features are centred and scaled as a whole (`_centre_and_scale`): the set
    of classifiers stays the same, and C means the same for every encoder. BLAS has one thread: several were up to 100 times
    slower on a busy machine.

    Args:
        data: features and labels.
        inverse_regularisations: the values of C that are compared.
        held_out_fraction: share of every class that they are compared on.
        seed: seed of the held-out part.

    Raises:
        ConfigError: a setting is out of range.
        DataError: fewer than two classes, or no class has two images.
    """
    if not inverse_regularisations or min(inverse_regularisations) <= 0.0:
        raise ConfigError(f"{inverse_regularisations=} is not allowed: one or more positive values")
    inputs, test_inputs = _centre_and_scale(data)
    truth = data.labels.cpu().numpy()

    def accuracies(kept: NDArray[np.int64], held_out: NDArray[np.int64]) -> list[float]:
        fitted = (_fit_logistic(inputs[kept], truth[kept], c)[0] for c in inverse_regularisations)
        return [float(np.mean(classifier.predict(inputs[held_out]) == truth[held_out])) for classifier in fitted]

    chosen, held_out_accuracies = _sweep(inverse_regularisations, data.labels, accuracies, held_out_fraction, seed)
    classifier, has_converged = _fit_logistic(inputs, truth, chosen)
    return LogisticProbe(
        correct=classifier.predict(test_inputs) == data.test_labels.cpu().numpy(),
        inverse_regularisation=chosen,
        held_out_accuracies=held_out_accuracies,
        has_converged=has_converged,
    )


def few_label_probe(
    data: ProbeData,
    *,
    shots: int,
    num_draws: int = FEW_SHOT_DRAWS,
    inverse_regularisation: float = FEW_LABEL_INVERSE_REGULARISATION,
) -> FewLabelProbe:
    """Fit logistic regression to `shots` labelled images per class, for each of `num_draws` fixed draws.

    C is fixed, because one or two labels leave nothing to choose it on. Features are centred and scaled by statistics of all
    training features, which needs no labels, so that C means the same for every encoder. Classes with fewer than `shots`
    images contribute all of them. The draws are those of `few_shot_knn_accuracy`.

    Raises:
        ConfigError: a setting is out of range.
        DataError: fewer than two classes.
    """
    if shots < 1 or num_draws < 1 or inverse_regularisation <= 0.0:
        raise ConfigError(f"{shots=} and {num_draws=} must be 1 or more, {inverse_regularisation=} positive")
    inputs, test_inputs = _centre_and_scale(data)
    truth, test_truth = data.labels.cpu().numpy(), data.test_labels.cpu().numpy()
    correct = []
    for draw in range(num_draws):
        rows = draw_shots(truth, shots, draw)
        classifier, _ = _fit_logistic(inputs[rows], truth[rows], inverse_regularisation)
        correct.append(classifier.predict(test_inputs) == test_truth)
    return FewLabelProbe(shots=shots, correct=np.stack(correct))


def _fit_logistic(
    inputs: NDArray[np.float64], labels: NDArray[np.int64], inverse_regularisation: float
) -> tuple[LogisticRegression, bool]:
    """Return the classifier, and whether it has converged."""
    if len(np.unique(labels)) < 2:
        raise DataError("a classifier needs labelled training images of two classes or more; there is one class")
    classifier = LogisticRegression(C=inverse_regularisation, max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings(), threadpool_limits(limits=1, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # returned instead
        classifier.fit(inputs, labels)
    return classifier, bool(np.max(classifier.n_iter_) < _MAX_ITERATIONS)


def _centre_and_scale(data: ProbeData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move and scale training and test features so that the training features have mean 0 and mean squared length 1."""
    inputs, test_inputs = data.features.double().cpu().numpy(), data.test_features.double().cpu().numpy()
    mean = inputs.mean(axis=0)
    scale = float(np.sqrt(np.square(inputs - mean).sum(axis=1).mean())) or 1.0
    return (inputs - mean) / scale, (test_inputs - mean) / scale


def _sweep(
    settings: tuple[float, ...],
    labels: Int64[Tensor, " train"],
    accuracies_of: Callable[[NDArray[np.int64], NDArray[np.int64]], list[float]],
    fraction: float,
    seed: int,
) -> tuple[float, tuple[float, ...]]:
    """Return the smallest setting with the best held-out accuracy, and all accuracies; a single setting is not tested."""
    if len(settings) == 1:
        return settings[0], ()
    kept, held_out = hold_out(labels.cpu().numpy(), fraction, seed=seed)
    if not len(held_out):
        raise DataError(
            f"none of the {len(labels)} labelled training images can be held out: no class has two; "
            "use more images, or give one value instead of a sweep"
        )
    accuracies = accuracies_of(kept, held_out)
    best = max(accuracies)
    chosen = min(value for value, accuracy in zip(settings, accuracies, strict=True) if accuracy == best)
    return chosen, tuple(accuracies)
