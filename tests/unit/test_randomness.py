"""Addressed randomness: prefix, independence, range."""

import numpy as np
import pytest

from hvp_ray.errors import ConfigError
from hvp_ray.randomness import (
    Purpose,
    check_seed,
    draw_stream,
    draw_words,
    permutation_from_words,
    uniform_from_words,
)


def _draw(seed: int = 3, ids: tuple[int, ...] = (5, 9, 2), epoch: int = 1, num_words: int = 7) -> np.ndarray:
    sample_ids = np.array(ids, dtype=np.int64)
    return draw_words(seed=seed, purpose=Purpose.GLOBAL_VIEWS, sample_ids=sample_ids, epoch=epoch, num_words=num_words)


def test_words_equal_philox_at_that_counter() -> None:
    philox = np.random.Philox(key=np.array([3, 2], np.uint64), counter=np.array([0, 0, 9, 1], np.uint64))
    assert np.array_equal(_draw()[1], philox.random_raw(7))


def test_first_words_do_not_depend_on_their_number() -> None:
    assert np.array_equal(_draw(num_words=300)[:, :7], _draw(num_words=7))


def test_row_depends_on_its_own_sample_only() -> None:
    assert np.array_equal(_draw(ids=(9,))[0], _draw(ids=(5, 9, 2))[1])


def test_neighbouring_seeds_epochs_and_samples_share_nothing() -> None:
    streams = [_draw(seed=s, ids=(i,), epoch=e)[0] for s in (0, 1) for i in (0, 1) for e in (0, 1)]
    words = np.concatenate(streams)
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="run.seed"):
        check_seed(seed)


def test_uniforms_lie_in_the_half_open_unit_interval_and_are_uniform() -> None:
    assert uniform_from_words(np.array([0, 2**64 - 1], np.uint64)).tolist() == [0.0, 1.0 - 2.0**-53]
    uniforms = uniform_from_words(draw_stream(seed=0, purpose=Purpose.PROBE, index=0, epoch=0, num_words=100_000))
    counts = np.histogram(uniforms, bins=20, range=(0, 1))[0]
    assert abs(counts - 5000).max() < 5 * np.sqrt(5000)


def test_permutation_is_a_permutation_with_ties_in_order() -> None:
    assert permutation_from_words(np.array([7, 1, 7, 0], np.uint64)).tolist() == [3, 1, 0, 2]


def test_permutation_is_that_of_a_stable_sort_also_where_words_are_equal(generator: np.random.Generator) -> None:
    for words in (generator.integers(0, 2**64, 1_000, np.uint64), generator.integers(0, 50, 1_000).astype(np.uint64)):
        assert np.array_equal(permutation_from_words(words), np.argsort(words, kind="stable"))
