"""Confidence intervals over test images (bootstrap) and over seeds (Student's t)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_rel

from hvp_ray.errors import ConfigError, ShapeError

_CELLS_AT_ONCE = 2**22


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float
    level: float
    """Nominal coverage, for instance 0.95."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """Result of `paired_difference`."""

    mean: float
    """Mean over the seeds of second - first."""
    interval: Interval
    standard_error: float
    p_value: float
    """Two-sided p-value of the hypothesis that the mean difference is 0; 1.0 if all differences are 0."""
    num_seeds: int

    @property
    def is_degenerate(self) -> bool:
        """Whether all seeds have the same difference, so that chance cannot be estimated."""
        return self.interval.low == self.interval.high


def bootstrap_interval(
    correct: NDArray[np.bool_] | NDArray[np.float64], *, level: float = 0.95, num_draws: int = 10_000, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of a mean over test images, [M]; of an accuracy if `correct` is bool.

    It covers the choice of test images from their distribution. The encoder, its seed, the classifier and the training
    images are fixed, so it does not cover another pretraining run; for that see `paired_difference`. Two arms on the same
    test images may differ significantly although their intervals overlap. With no or all images correct it has no width
    and understates the uncertainty (3 / M is then the usual upper limit of the error rate). Below about 30 correct or 30
    wrong images it is too narrow.

    Images of equal value are drawn together, by one multinomial number per distinct value. This has the distribution of
    drawing M images with replacement. The interval is deterministic for one version of NumPy.

    Raises:
        ConfigError: the level or the number of draws is out of range.
        ShapeError: no images.
    """
    _check_level(level)
    if num_draws < 1:
        raise ConfigError(f"{num_draws=} is not allowed: 1 or more")
    if correct.ndim != 1 or not len(correct):
        raise ShapeError(f"correct: expected [M] with M >= 1, got {correct.shape}")
    values, counts = np.unique(correct.astype(np.float64), return_counts=True)
    generator = np.random.default_rng(seed)
    draws_at_once = max(1, _CELLS_AT_ONCE // len(values))
    means = np.concatenate(
        [
            generator.multinomial(len(correct), counts / len(correct), size=min(draws_at_once, num_draws - start))
            @ values
            for start in range(0, num_draws, draws_at_once)
        ]
    ) / len(correct)
    low, high = np.quantile(means, [(1.0 - level) / 2, (1.0 + level) / 2]).tolist()
    return Interval(low=low, high=high, level=level)


def paired_difference(
    first: NDArray[np.float64], second: NDArray[np.float64], *, level: float = 0.95
) -> PairedDifference:
    """Compare two arms over seeds, [S] each, row s of both from the same seed; return second - first with a t interval.

    It covers the seeds: initial weights, order and views of pretraining. It assumes normally distributed differences, which
    a few seeds cannot show. It does not cover the test set: all seeds share the test images, so an advantage on these images
    only goes unnoticed. With 2 or 3 seeds the interval is wide (t = 12.7 and 4.3 standard errors), as it should be.

    Raises:
        ConfigError: the level is out of range.
        ShapeError: fewer than two seeds, or arms of different lengths.
    """
    _check_level(level)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ShapeError(f"expected two arms of the same two or more seeds, got {first.shape} and {second.shape}")
    differences = np.asarray(second, dtype=np.float64) - first
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    low, high, p_value = mean, mean, 0.0 if mean else 1.0  # if all differences are equal
    if error > _ROUNDING * max(1.0, abs(mean)):
        test = ttest_rel(second, first)
        low, high = test.confidence_interval(level)
        p_value = float(test.pvalue)
    return PairedDifference(
        mean=mean,
        interval=Interval(low=float(low), high=float(high), level=level),
        standard_error=error,
        p_value=p_value,
        num_seeds=len(differences),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number: claims below 0.05 are all true with a probability of 95 % or more.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979). It assumes nothing about dependence.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


_ROUNDING = 1e-12


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ConfigError(f"{level=} is not allowed: between 0 and 1")
