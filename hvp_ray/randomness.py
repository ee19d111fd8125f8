"""Counter-based randomness: every random number of a run has an address.

A number is addressed by (run seed, purpose, sample id, epoch, index). Nothing has a running state, so any
process can draw any number at any time, in any order, and after any restart.

The generator is Philox-4x64 with ten rounds (Salmon et al., SC 2011) as NumPy ships it: key = (seed, purpose),
counter = (0, 0, sample id, epoch). Only `random_raw` is used; NumPy does not promise that the streams of its
`Generator` methods stay the same between versions.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from hvp_ray.errors import ConfigError

_LARGEST_WORD = 2**64 - 1


class Purpose(IntEnum):
    """What a stream of random numbers is for. Values are part of every run's identity: never renumber."""

    ORDER = 1
    GLOBAL_VIEWS = 2
    LOCAL_VIEWS = 3
    MASKS = 4
    REPLACEMENT = 5
    REPLACEMENT_VIEWS = 6
    RANDOM_PAIR = 7
    TORCH_INIT = 8
    TORCH_SCORING = 9
    TORCH_TRAINING = 10
    SUBSET = 11
    SPLIT = 12
    PROBE = 13
    REPLACEMENT_LOCAL_VIEWS = 14
    REPLACEMENT_MASKS = 15
    RANDOM_LOCALS = 16
    CANDIDATES = 17


def check_seed(seed: int) -> int:
    """Return `seed`, or raise: NumPy accepts negative keys silently and wraps them.

    Raises:
        ConfigError: not an integer in [0, 2**64).
    """
    if not 0 <= seed <= _LARGEST_WORD:
        raise ConfigError(f"run.seed={seed}: a seed is an integer from 0 to 2**64 - 1; choose one in that range")
    return seed


def draw_words(
    *, seed: int, purpose: Purpose, sample_ids: NDArray[np.int64], epoch: int, num_words: int
) -> NDArray[np.uint64]:
    """Draw `num_words` random 64-bit words for each sample id, [B, num_words].

    Prefix property: the first words do not depend on `num_words`. A row depends on its own sample id only, not on
    the other samples or on their order.

    Raises:
        ConfigError: seed, epoch or a sample id is negative or too large.
    """
    check_seed(seed)
    if not 0 <= epoch <= _LARGEST_WORD or (len(sample_ids) and int(sample_ids.min()) < 0):
        raise ConfigError(f"{epoch=} and sample ids address random numbers and must not be negative")
    words = np.empty((len(sample_ids), num_words), dtype=np.uint64)
    bit_generator = np.random.Philox(key=0)
    state = bit_generator.state
    state["state"]["key"] = np.array([seed, int(purpose)], dtype=np.uint64)
    # A new address must not see words left over from the last one: buffer_pos=4 empties the buffer.
    state["buffer_pos"] = 4
    state["has_uint32"] = 0
    for row, sample_id in zip(words, sample_ids.tolist(), strict=True):
        state["state"]["counter"] = np.array([0, 0, sample_id, epoch], dtype=np.uint64)
        bit_generator.state = state
        row[:] = bit_generator.random_raw(num_words)
    return words


def draw_stream(*, seed: int, purpose: Purpose, index: int, epoch: int, num_words: int) -> NDArray[np.uint64]:
    """Draw one stream of words, [num_words], for things that are not samples (an epoch's order, a torch seed)."""
    return draw_words(
        seed=seed, purpose=purpose, sample_ids=np.array([index], dtype=np.int64), epoch=epoch, num_words=num_words
    )[0]


def uniform_from_words(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map 64-bit words to [0, 1): the upper 53 bits, so that every value is exact in float64."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation_from_words(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return a uniform permutation of 0..n-1: the indices that sort n random words, stable for equal words."""
    places = np.argsort(words)  # twice as fast as a stable sort, and equal if no words are equal
    in_order = words[places]
    if bool((in_order[1:] == in_order[:-1]).any()):
        places = np.argsort(words, kind="stable")
    return places.astype(np.int64, copy=False)


def draw_torch_seed(*, seed: int, purpose: Purpose, step: int, rank: int, part: int = 0) -> int:
    """Draw the seed of torch's generator for one part of one step of one rank, in [0, 2**63)."""
    word = draw_stream(seed=seed, purpose=purpose, index=rank, epoch=step, num_words=part + 1)[part]
    return int(word >> np.uint64(1))
