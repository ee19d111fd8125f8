"""The order of the samples: step -> sample ids, as a pure function of (seed, epoch, position).

The global batch of a step is the same for any number of ranks; rank r takes its slice.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hvp_ray.errors import ConfigError, DataError
from hvp_ray.randomness import Purpose, draw_stream, permutation_from_words


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOrder:
    """Visits every sample at most once per epoch; a last part smaller than one step is dropped.

    With `block_starts` (row groups of a Parquet file), blocks are permuted, and samples are permuted inside windows of
    `window_images`. Neighbouring steps then read few blocks, and only the current window is in memory. Otherwise the
    permutation is global. Orders compare by identity, so that the last windows can be cached.
    """

    seed: int
    sample_ids: NDArray[np.int64]
    """[N], ascending: the samples to visit."""
    images_per_step: int
    """Images of a step over all ranks."""
    block_starts: NDArray[np.int64] | None = None
    """First sample id of every block, ascending, beginning with 0; None: random access is cheap."""
    window_images: int = 65_536

    def __post_init__(self) -> None:
        if len(self.sample_ids) < self.images_per_step:
            raise DataError(
                f"the data has {len(self.sample_ids)} images for training, fewer than one step needs: "
                f"training.images_per_step={self.images_per_step}; use more images or a smaller step"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one pass over the data."""
        return len(self.sample_ids) // self.images_per_step

    def epoch_of(self, step: int) -> int:
        """Return the epoch that step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def first_position(self, step: int) -> int:
        """Return the position, in its epoch, of the first image of step `step`."""
        return (step % self.steps_per_epoch) * self.images_per_step

    def sample_ids_of_step(self, step: int, *, rank: int = 0, num_ranks: int = 1) -> NDArray[np.int64]:
        """Return the sample ids of one rank's share of step `step`, [images_per_step / num_ranks].

        Raises:
            ConfigError: images_per_step is not a multiple of the number of ranks.
        """
        if self.images_per_step % num_ranks:
            raise ConfigError(f"images_per_step={self.images_per_step} is not a multiple of {num_ranks} ranks")
        per_rank = self.images_per_step // num_ranks
        start = self.first_position(step) + rank * per_rank
        return self._slice(self.epoch_of(step), start, start + per_rank)

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Return all sample ids in the order of epoch `epoch`, [N]."""
        return self._slice(epoch, 0, len(self.sample_ids))

    @property
    def _window(self) -> int:
        return len(self.sample_ids) if self.block_starts is None else min(self.window_images, len(self.sample_ids))

    def _slice(self, epoch: int, start: int, end: int) -> NDArray[np.int64]:
        """Return the sample ids at positions `start` to `end`. Computes only their windows."""
        parts = []
        for index in range(start // self._window, -(-end // self._window)):
            first = index * self._window
            parts.append(_order_of_window(self, epoch, index)[max(0, start - first) : end - first])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _compute_window(self, epoch: int, index: int) -> NDArray[np.int64]:
        start = index * self._window
        end = min(start + self._window, len(self.sample_ids))
        ids = self.sample_ids[start:end] if self.block_starts is None else self._take_blocks(epoch, start, end)
        # Stream 0 permutes the blocks; window w has stream w + 1.
        words = draw_stream(seed=self.seed, purpose=Purpose.ORDER, index=index + 1, epoch=epoch, num_words=len(ids))
        return ids[permutation_from_words(words)]

    def _take_blocks(self, epoch: int, start: int, end: int) -> NDArray[np.int64]:
        """Return the samples at positions `start` to `end` of the concatenated blocks of the epoch."""
        begins, positions = _order_of_blocks(self, epoch)
        first = int(np.searchsorted(positions, start, side="right")) - 1
        last = int(np.searchsorted(positions, end, side="left"))
        parts = []
        for place in range(first, last):
            begin, size = int(begins[place]), int(positions[place + 1] - positions[place])
            skipped, kept = max(0, start - int(positions[place])), min(size, end - int(positions[place]))
            parts.append(self.sample_ids[begin + skipped : begin + kept])
        return np.concatenate(parts)

    def _compute_blocks(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the blocks in the epoch's order: indices of their first samples in `sample_ids`, and their positions."""
        assert self.block_starts is not None
        bounds = np.searchsorted(self.sample_ids, self.block_starts)
        sizes = np.diff(np.append(bounds, len(self.sample_ids)))
        words = draw_stream(seed=self.seed, purpose=Purpose.ORDER, index=0, epoch=epoch, num_words=len(bounds))
        turn = permutation_from_words(words)
        return bounds[turn], np.concatenate([[0], np.cumsum(sizes[turn])])


@lru_cache(maxsize=4)
def _order_of_window(order: SampleOrder, epoch: int, index: int) -> NDArray[np.int64]:
    ids = order._compute_window(epoch, index)
    ids.setflags(write=False)
    return ids


@lru_cache(maxsize=2)
def _order_of_blocks(order: SampleOrder, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return order._compute_blocks(epoch)


def choose_subset(num_samples: int, num_images: int | None) -> NDArray[np.int64]:
    """Return the sample ids to use, ascending: a fixed pseudo-random subset, equal for every seed.

    Raises:
        DataError: more images are asked for than there are.
    """
    if num_images is None:
        return np.arange(num_samples, dtype=np.int64)
    if num_images > num_samples:
        raise DataError(f"data.num_images={num_images}, but the source has only {num_samples} images")
    words = draw_stream(seed=0, purpose=Purpose.SUBSET, index=0, epoch=0, num_words=num_samples)
    return np.sort(permutation_from_words(words)[:num_images])


def split_for_test(sample_ids: NDArray[np.int64], test_fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split ids into (training, test), both ascending; fixed, equal for every seed."""
    num_test = round(len(sample_ids) * test_fraction)
    words = draw_stream(seed=0, purpose=Purpose.SPLIT, index=0, epoch=0, num_words=len(sample_ids))
    shuffled = sample_ids[permutation_from_words(words)]
    return np.sort(shuffled[num_test:]), np.sort(shuffled[:num_test])
