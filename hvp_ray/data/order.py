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
    """Visits every sample at most once an epoch; a last part smaller than one step is dropped.

    Where `block_sizes` is given (row groups of a Parquet file), blocks are permuted and samples are permuted inside
    windows of `window_images`: neighbouring steps then read few blocks. Otherwise the permutation is global.
    (Compared by identity, so that the orders of the last epochs can be cached.)
    """

    seed: int
    sample_ids: NDArray[np.int64]
    """[N], ascending: the samples that take part."""
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
        return self.epoch_order(self.epoch_of(step))[start : start + per_rank]

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Return all sample ids in the order of epoch `epoch`, [N]."""
        return _epoch_order(self, epoch)

    def _compute(self, epoch: int) -> NDArray[np.int64]:
        ids = self.sample_ids
        window = len(ids)
        if self.block_starts is not None:
            ids = self._permute_blocks(epoch)
            window = self.window_images
        parts = []
        for index, start in enumerate(range(0, len(ids), window)):
            part = ids[start : start + window]
            # Stream 0 permutes the blocks; window w has stream w + 1.
            words = draw_stream(
                seed=self.seed, purpose=Purpose.ORDER, index=index + 1, epoch=epoch, num_words=len(part)
            )
            parts.append(part[permutation_from_words(words)])
        return np.concatenate(parts)

    def _permute_blocks(self, epoch: int) -> NDArray[np.int64]:
        assert self.block_starts is not None
        bounds = np.searchsorted(self.sample_ids, self.block_starts)
        blocks = np.split(self.sample_ids, bounds[1:])
        words = draw_stream(seed=self.seed, purpose=Purpose.ORDER, index=0, epoch=epoch, num_words=len(blocks))
        return np.concatenate([blocks[index] for index in permutation_from_words(words)])


@lru_cache(maxsize=4)
def _epoch_order(order: SampleOrder, epoch: int) -> NDArray[np.int64]:
    ids = order._compute(epoch)
    ids.setflags(write=False)
    return ids


def choose_subset(num_samples: int, num_images: int | None) -> NDArray[np.int64]:
    """Return the sample ids that take part, ascending: a fixed pseudo-random subset, the same for every seed.

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
    """Split ids into (training, test), both ascending; fixed, the same for every seed."""
    num_test = round(len(sample_ids) * test_fraction)
    words = draw_stream(seed=0, purpose=Purpose.SPLIT, index=0, epoch=0, num_words=len(sample_ids))
    shuffled = sample_ids[permutation_from_words(words)]
    return np.sort(shuffled[num_test:]), np.sort(shuffled[:num_test])
