"""Intervals agree with theory: the binomial distribution, the paired t-test, and a case by hand."""

import numpy as np
import pytest
import scipy.stats

from hvp_ray.errors import ConfigError, ShapeError
from hvp_ray.evaluation.intervals import bootstrap_interval, holm, paired_difference


@pytest.mark.parametrize(("num_correct", "num_images"), [(873, 1000), (50, 100), (9600, 10_000)])
def test_bootstrap_of_an_accuracy_is_the_binomial_interval(num_correct: int, num_images: int) -> None:
    correct = np.arange(num_images) < num_correct
    found = bootstrap_interval(correct)
    low, high = scipy.stats.binom.ppf([0.025, 0.975], num_images, num_correct / num_images) / num_images
    assert found.low == pytest.approx(low, abs=2.1 / num_images)
    assert found.high == pytest.approx(high, abs=2.1 / num_images)
    assert found.level == 0.95


def test_bootstrap_of_shares_is_that_of_drawn_images(generator: np.random.Generator) -> None:
    shares = generator.integers(0, 21, 400) / 20
    found = bootstrap_interval(shares)
    means = shares[generator.integers(0, 400, (4000, 400))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.003)
    assert found.high == pytest.approx(high, abs=0.003)


def test_bootstrap_covers_as_often_as_it_says(generator: np.random.Generator) -> None:
    hits = 0
    for _ in range(400):
        interval = bootstrap_interval(generator.uniform(size=500) < 0.8, num_draws=1000)
        hits += interval.low <= 0.8 <= interval.high
    assert 0.91 < hits / 400 < 0.98


def test_bootstrap_is_deterministic_and_independent_of_order(generator: np.random.Generator) -> None:
    correct = generator.uniform(size=300) < 0.7
    first = bootstrap_interval(correct)
    assert first == bootstrap_interval(generator.permutation(correct))
    shares = generator.uniform(size=50)
    assert bootstrap_interval(shares) != bootstrap_interval(shares, seed=1)
    wide, narrow = bootstrap_interval(correct, level=0.99), bootstrap_interval(correct, level=0.5)
    assert wide.low < first.low < narrow.low < narrow.high < first.high < wide.high


def test_bootstrap_of_all_correct_has_no_width() -> None:
    interval = bootstrap_interval(np.ones(10, np.bool_))
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_paired_difference_is_the_paired_t_test(generator: np.random.Generator) -> None:
    first = generator.normal(0.7, 0.02, 5)
    second = first + generator.normal(0.01, 0.005, 5)
    found = paired_difference(first, second)
    oracle = scipy.stats.ttest_rel(second, first)
    expected = oracle.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(second - first))
    assert found.interval.low == pytest.approx(expected.low)
    assert found.interval.high == pytest.approx(expected.high)
    assert found.p_value == pytest.approx(oracle.pvalue)
    assert found.num_seeds == 5
    back = paired_difference(second, first)
    assert back.mean == pytest.approx(-found.mean)
    assert back.interval.high == pytest.approx(-found.interval.low)


def test_paired_difference_of_three_seeds_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, deviation 1, standard error 1 / sqrt(3); t of two degrees of freedom is 4.3027.
    found = paired_difference(np.array([0.0, 5.0, 1.0]), np.array([1.0, 7.0, 4.0]))
    assert found.mean == 2.0
    assert found.standard_error == pytest.approx(3**-0.5)
    assert found.interval.high - found.mean == pytest.approx(4.3027 * 3**-0.5, abs=1e-4)


def test_equal_arms_differ_by_nothing() -> None:
    same = np.array([0.5, 0.6])
    found = paired_difference(same, same)
    assert (found.mean, found.interval.low, found.interval.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert paired_difference(same, same + 0.25).p_value == pytest.approx(0.0)


def test_holm_by_hand_and_at_its_level(generator: np.random.Generator) -> None:
    """By hand: 3 * 0.01; 2 * 0.03; then 0.04, which may not be below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.7, 0.8]) == [1.0, 1.0]
    # Nine arms that equal vanilla: at most one table in twenty has a claim, where 37 % have one without the correction.
    tables = generator.uniform(size=(4000, 9))
    assert np.mean([min(holm(table.tolist())) < 0.05 for table in tables]) == pytest.approx(0.05, abs=0.012)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="two or more seeds"):
        paired_difference(np.ones(1), np.ones(1))
    with pytest.raises(ShapeError, match="same"):
        paired_difference(np.ones(3), np.ones(2))
    with pytest.raises(ShapeError, match="M >= 1"):
        bootstrap_interval(np.zeros(0, np.bool_))
    with pytest.raises(ConfigError, match="level=95"):
        bootstrap_interval(np.ones(3, np.bool_), level=95.0)
