"""Checks, before a run starts, whether images have more than 8 bits a channel, and suggests an intensity range for them.

The sample is spread over training and test set and is the same at every start. The range itself is a setting, so it is the
same for all images and part of the run's identity.
"""

import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.decode import read_intensities
from hvp_ray.data.intensity import Intensities, IntensityRange
from hvp_ray.errors import ConfigError, UnreadableImageError
from hvp_ray.stream.reading import read_sample

_VALUES_OF_AN_IMAGE = 4_096
"""Evenly spaced values of each image, at most, in the percentiles."""

_CENTRAL_PERCENTILES = (0.1, 99.9)
"""Almost all values lie between these."""


def check_intensities(data: DataConfig, dataset: Dataset, *, option: str = "--data.intensity_range") -> list[str]:
    """Sample the images; return remarks on their intensities. Empty: they have 8 bits a channel.

    Args:
        data: the setting.
        dataset: the images.
        option: command-line option that sets the range, for messages.

    Raises:
        ConfigError: images have more than 8 bits a channel, and `data.intensity_range` is not set.
        DataError: the storage failed repeatedly.
    """
    images = read_sample(dataset.source, dataset.training_ids)
    if dataset.test_source is not dataset.source:
        images = itertools.chain(images, read_sample(dataset.test_source, dataset.test_ids))
    found = _Sample(images, data)
    if data.intensity_range is None:
        if not found.kinds:
            return []
        black, white = found.suggest_range()
        raise ConfigError(
            f"data.source={data.source!r}: {found.describe()}. Expected data.intensity_range, the values of black and "
            f"white; give {option} {black:.10g} {white:.10g}, or the range that you want to see"
        )
    if not found.kinds:
        return [
            f"data.intensity_range is not used: the {found.num_images} sampled images have at most 8 bits a channel"
        ]
    black, white = data.intensity_range
    clipped = found.share_outside(data.intensity_range)
    return [
        f"{found.describe()}; data.intensity_range makes {black:.10g} black and {white:.10g} white"
        f"{f', and clips {clipped:.1%} of the values' if clipped else ''}"
    ]


class _Sample:
    """The finite values of the sampled images that have more than 8 bits a channel."""

    def __init__(self, images: Iterable[bytes], data: DataConfig) -> None:
        self.kinds: Counter[str] = Counter()
        self.num_images = 0
        self._low, self._high = float("inf"), float("-inf")
        self._are_integers = True
        some: list[NDArray[np.float64]] = []
        for image in images:
            self.num_images += 1
            try:
                found = read_intensities(image, max_pixels=data.max_image_pixels, channels=data.channels)
            except UnreadableImageError:
                continue
            if found is not None:
                some.append(self._take(found))
        self._some = np.concatenate(some) if some else np.zeros(0)

    def _take(self, image: Intensities) -> NDArray[np.float64]:
        """Count an image; return some of its values."""
        self.kinds[image.kind] += 1
        values = image.values.reshape(-1)
        if values.dtype.kind == "f":
            self._are_integers = False
            values = values[np.isfinite(values)]
        if not len(values):
            return np.zeros(0)
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        return values[:: -(-len(values) // _VALUES_OF_AN_IMAGE)].astype(np.float64)

    def describe(self) -> str:
        """Return kinds of images, with counts and ranges."""
        what = " and ".join(f"{n} of {self.num_images} sampled images hold {kind}" for kind, n in self.kinds.items())
        if not len(self._some):
            return f"{what}, none of them finite"
        low, high = np.percentile(self._some, _CENTRAL_PERCENTILES).tolist()
        central = ""
        if high - low < 0.5 * (self._high - self._low):
            share = _CENTRAL_PERCENTILES[1] - _CENTRAL_PERCENTILES[0]
            central = f" ({share:g} % of them from {low:g} to {high:g})"
        return f"{what}, from {self._low:.10g} to {self._high:.10g}{central}"

    def share_outside(self, intensity_range: IntensityRange) -> float:
        """Return the share of the values that a range clips."""
        black, white = intensity_range
        outside = (self._some < black) | (self._some > white)
        return float(outside.mean()) if len(outside) else 0.0

    def suggest_range(self) -> IntensityRange:
        """Return a range that clips no value of the sample; for integers from 0 all values of their number of bits."""
        low, high = self._low, self._high
        if not len(self._some):
            return 0.0, 1.0
        if self._are_integers and low >= 0:
            return 0.0, 2.0 ** max(1, int(high).bit_length()) - 1
        if low >= 0 and high <= 1:
            return 0.0, 1.0
        return low, high if low < high else low + 1
