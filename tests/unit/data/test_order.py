"""The order: each sample once an epoch, the same for any number of ranks, near together where rows are grouped."""

import numpy as np
import pytest

from hvp_ray.data.order import SampleOrder, choose_subset, split_for_test
from hvp_ray.errors import DataError


def _order(seed: int = 0, samples: int = 103, images_per_step: int = 12, **options: object) -> SampleOrder:
    return SampleOrder(seed=seed, sample_ids=np.arange(0, 2 * samples, 2), images_per_step=images_per_step, **options)


def _grouped(seed: int = 0) -> SampleOrder:
    return SampleOrder(
        seed=seed,
        sample_ids=np.arange(10_000),
        images_per_step=50,
        block_starts=np.arange(0, 10_000, 100),
        window_images=1000,
    )


@pytest.mark.parametrize("order", [_order(), _grouped()])
def test_each_sample_once_an_epoch_and_epochs_differ(order: SampleOrder) -> None:
    first, second = order.epoch_order(0), order.epoch_order(1)
    assert np.array_equal(np.sort(first), order.sample_ids)
    assert np.array_equal(np.sort(second), order.sample_ids)
    assert not np.array_equal(first, second)


def test_seeds_differ_and_repeat() -> None:
    assert np.array_equal(_order(seed=4).epoch_order(3), _order(seed=4).epoch_order(3))
    assert not np.array_equal(_order(seed=4).epoch_order(3), _order(seed=5).epoch_order(3))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_global_batch_is_the_same_for_any_number_of_ranks(num_ranks: int) -> None:
    order = _order()
    for step in range(20):
        parts = [order.sample_ids_of_step(step, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        assert np.array_equal(np.concatenate(parts), order.sample_ids_of_step(step))


def test_steps_cross_epochs() -> None:
    order = _order()
    assert order.steps_per_epoch == 8
    assert [order.epoch_of(step) for step in (0, 7, 8, 16)] == [0, 0, 1, 2]
    assert np.array_equal(order.sample_ids_of_step(8), order.epoch_order(1)[:12])
    assert order.first_position(9) == 12


def test_grouped_order_reads_few_blocks_at_a_time_and_all_over_an_epoch() -> None:
    order = _grouped()
    blocks_per_window = [len(np.unique(order.epoch_order(0)[s : s + 1000] // 100)) for s in range(0, 10_000, 1000)]
    assert max(blocks_per_window) == 10  # 1,000 images in blocks of 100
    first_window = np.unique(order.epoch_order(0)[:1000] // 100)
    assert not np.array_equal(first_window, np.unique(order.epoch_order(1)[:1000] // 100))


def test_too_few_images_is_an_error_with_the_numbers() -> None:
    with pytest.raises(DataError, match=r"10 images.*images_per_step=12"):
        _order(samples=10)


def test_subset_is_fixed_and_spread() -> None:
    ids = choose_subset(1000, 100)
    assert len(np.unique(ids)) == 100
    assert np.array_equal(ids, choose_subset(1000, 100))
    assert ids.max() > 900
    assert ids.min() < 100
    with pytest.raises(DataError, match="only 10 images"):
        choose_subset(10, 11)


def test_split_is_disjoint_and_complete() -> None:
    training, test = split_for_test(np.arange(500), 0.2)
    assert len(test) == 100
    assert np.array_equal(np.sort(np.concatenate([training, test])), np.arange(500))
