"""The random numbers that selection rules draw, by address: any process can draw them again after any restart."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvp_ray.randomness import Purpose, draw_stream, draw_words


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """The address of one rank's batch of one step among the run's random numbers."""

    seed: int
    """The run's seed."""
    step: int
    rank: int
    epoch: int
    sample_ids: NDArray[np.int64]
    """[B]."""

    def words_of_images(self, purpose: Purpose, num_words: int) -> NDArray[np.uint64]:
        """Draw words for each image, [B, num_words], addressed by sample id and epoch like the views."""
        return draw_words(
            seed=self.seed, purpose=purpose, sample_ids=self.sample_ids, epoch=self.epoch, num_words=num_words
        )

    def words_of_step(self, purpose: Purpose, num_words: int) -> NDArray[np.uint64]:
        """Draw words that all images of this rank's step share, [num_words]."""
        return draw_stream(seed=self.seed, purpose=purpose, index=self.rank, epoch=self.step, num_words=num_words)


def indices_from_words(words: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Map each word to an index below `count`."""
    return (words % np.uint64(count)).astype(np.int64)


def subsets_from_words(words: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    """Map each row of words [..., N] to a uniform subset of 0..N-1, ascending, [..., size]."""
    return np.sort(np.argsort(words, axis=-1, kind="stable")[..., :size], axis=-1).astype(np.int64)
