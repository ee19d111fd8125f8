"""Mean and standard deviation of each channel, measured for `views.mean` and `views.std`, and remarks on `data.channels`."""

from dataclasses import dataclass

import numpy as np

from hvp_ray.config import DataConfig, RunConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.decode import decode_pixels
from hvp_ray.errors import ConfigError, DataError, UnreadableImageError
from hvp_ray.runs.intensity_check import check_intensities
from hvp_ray.stream.reading import read_sample

_DIGITS = 4
_LEAST_STD = 1 / 255
"""One level, for channels that do not vary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel over sampled training images, scaled to 0..1; images weigh the same."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: int

    def options(self) -> str:
        """Return the options that set them."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"--views.mean {mean} --views.std {std}"


def measure_channels(data: DataConfig, dataset: Dataset) -> ChannelStatistics:
    """Decode a sample of the training images; the sample is the same at every call.

    Raises:
        ConfigError: the images have more than 8 bits a channel, and `data.intensity_range` is not set.
        DataError: none of them has `data.channels` channels, or the storage failed repeatedly.
    """
    means, squares, reason = [], [], "there are no images"
    for image in read_sample(dataset.source, dataset.training_ids):
        try:
            levels = decode_pixels(image, data)
        except UnreadableImageError as error:
            reason = str(error)
            continue
        levels_NC = levels.reshape(-1, data.channels) / 255.0
        means.append(levels_NC.mean(axis=0))
        squares.append(np.square(levels_NC).mean(axis=0))
    if not means:
        check_intensities(data, dataset)
        raise DataError(f"data.source={data.source!r}: none of the sampled images can be used: {reason}")
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - np.square(mean), 0.0)).clip(min=_LEAST_STD)
    return ChannelStatistics(
        mean=tuple(mean.round(_DIGITS).tolist()), std=tuple(std.round(_DIGITS).tolist()), num_images=len(means)
    )


def check_channels(config: RunConfig, dataset: Dataset) -> None:
    """Check that there is a mean for every channel.

    Raises:
        ConfigError: there is not; the message has measured values, as options.
        DataError: see `measure_channels`.
    """
    given, channels = len(config.views.mean), config.data.channels
    if given != channels:
        found = measure_channels(config.data, dataset)
        raise ConfigError(
            f"views.mean and views.std have {given} value(s), but data.channels={channels}. Give what {found.num_images} "
            f"sampled images have: {found.options()}"
        )


def describe_channels(config: RunConfig) -> tuple[str, ...]:
    """Return a remark on images that are not RGB; none for RGB."""
    channels = config.data.channels
    if channels == 3:
        return ()
    shown = "grey" if channels == 1 else "their first three channels" if channels > 2 else "red and green"
    return (
        f"data.channels={channels}: saturation, hue and conversion to grey are off, because they need RGB; figures show the "
        f"images as {shown}",
    )
