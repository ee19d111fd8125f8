"""Which samples of which source are trained on, and which are evaluated: `DataConfig` resolved."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.order import choose_subset, split_for_test
from hvp_ray.data.source import Source, open_source
from hvp_ray.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """The data of a run."""

    source: Source
    training_ids: NDArray[np.int64]
    """[N], ascending: sample ids of `source` that are trained on."""
    test_source: Source
    test_ids: NDArray[np.int64]
    """[M], ascending: sample ids of `test_source`; may be empty."""

    def shuffle_window_images(self, config: DataConfig) -> int:
        """Return how many images `SampleOrder` shuffles together: as many as the settings allow for this source."""
        if not self.source.reads_whole_blocks:
            return config.shuffle_window_images
        per_image = max(1.0, self.source.num_bytes / self.source.num_samples)
        return max(1, min(config.shuffle_window_images, int(config.shuffle_window_mib * 2**20 / per_image)))

    def fingerprint(self) -> str:
        """Digest of the images that are trained on."""
        return self.source.fingerprint()


def open_dataset(config: DataConfig) -> Dataset:
    """Open the sources and split off what is held out.

    Raises:
        DataError: a source cannot be used, or has fewer images than asked for.
    """
    source = open_source(config.source, config)
    ids = choose_subset(source.num_samples, config.num_images)
    if config.test_source is not None:
        test_source = open_source(config.test_source, config)
        test_ids = np.arange(test_source.num_samples, dtype=np.int64)
        return Dataset(source=source, training_ids=ids, test_source=test_source, test_ids=test_ids)
    training_ids, test_ids = split_for_test(ids, config.test_fraction if source.has_labels else 0.0)
    return Dataset(source=source, training_ids=training_ids, test_source=source, test_ids=test_ids)


def open_unchanged(config: DataConfig, fingerprint: str) -> Dataset:
    """Open the data of a run that has begun, in a process that joins it later.

    Args:
        config: the run's.
        fingerprint: `Dataset.fingerprint` when the run was prepared.

    Raises:
        DataError: as `open_dataset`; or the source has other images than then, so ids would name other images.
    """
    dataset = open_dataset(config)
    if dataset.fingerprint() != fingerprint:
        raise DataError(
            f"data.source={config.source!r} has changed since the run was started: it has {dataset.source.num_samples} "
            f"images now, with other names or sizes. Put back what is gone and remove what is new, then start the run again "
            f"with its name"
        )
    return dataset
