"""Read encoded images from a source, with retries."""

import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hvp_ray.data.source import Source
from hvp_ray.errors import DataError
from hvp_ray.records import EncodedBatch

logger = logging.getLogger(__name__)

READ_ATTEMPTS = 4
"""An I/O error is retried until then, after pauses of 0.1, 0.4 and 1.6 s, and then stops the run."""

SAMPLE_IMAGES = 64
"""Images of a sample that represents a source."""

_SAMPLE_RUNS = 4
_SAMPLE_PART = 8
"""Images of a sample that are read at a time."""
_SAMPLE_BYTES = 256 * 2**20


def read_images(source: Source, sample_ids: Sequence[int]) -> EncodedBatch:
    """Read the encoded images, with retries.

    Raises:
        DataError: the storage failed `READ_ATTEMPTS` times.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            images = source.read(sample_ids)
            return EncodedBatch(images=images, sample_ids=np.asarray(sample_ids, dtype=np.int64))
        except OSError as error:
            if attempt == READ_ATTEMPTS - 1:
                first = source.describe(sample_ids[0])
                raise DataError(
                    f"reading {len(sample_ids)} images from {first} on failed {READ_ATTEMPTS} times: {error}; "
                    f"check the storage, then start the run again with its name"
                ) from error
            logger.warning("reading failed (%s), attempt %d of %d", error, attempt + 1, READ_ATTEMPTS)
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def read_sample(
    source: Source,
    sample_ids: NDArray[np.int64],
    num_images: int = SAMPLE_IMAGES,
    *,
    max_bytes: int = _SAMPLE_BYTES,
) -> Iterator[bytes]:
    """Yield encoded images spread over `sample_ids`, read a few at a time; each call yields the same images.

    From a source that reads whole blocks, the sample is a few runs of neighbours.

    Args:
        source: source of the images.
        sample_ids: [N], the ids to choose from.
        num_images: at most this many.
        max_bytes: the sample ends after this many bytes, but not before 8 images.

    Raises:
        DataError: the storage failed repeatedly.
    """
    num_images = min(num_images, len(sample_ids))
    num_runs = min(_SAMPLE_RUNS, num_images) if source.reads_whole_blocks else num_images
    if not num_runs:
        return
    length = num_images // num_runs
    starts = np.linspace(0, len(sample_ids) - length, num_runs).astype(np.int64)
    # A sample that ends early is spread too: 0, 1/2, 1/4, 3/4, 1/8, ... of all (bits of the index, reversed).
    num_bits = num_runs.bit_length()
    order = sorted(range(num_runs), key=lambda index: f"{index:0{num_bits}b}"[::-1])
    rows = (starts[order, None] + np.arange(length)).ravel()
    num_bytes = 0
    for first in range(0, len(rows), _SAMPLE_PART):
        images = read_images(source, sample_ids[rows[first : first + _SAMPLE_PART]].tolist()).images
        num_bytes += sum(map(len, images))
        yield from images
        if num_bytes >= max_bytes:
            return
