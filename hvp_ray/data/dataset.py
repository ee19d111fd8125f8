"""Resolve `DataConfig`: which samples of which source to train on, and which to evaluate."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hvp_ray.config import DataConfig
from hvp_ray.data.order import choose_subset, split_for_test
from hvp_ray.data.source import Source, open_source
from hvp_ray.errors import ChangedDataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Sources and sample ids of a run."""

    source: Source
    training_ids: NDArray[np.int64]
    """[N], ascending: sample ids of `source` to train on."""
    test_source: Source
    test_ids: NDArray[np.int64]
    """[M], ascending: sample ids of `test_source`; may be empty."""

    def shuffle_window_images(self, config: DataConfig) -> int:
        """Return the number of images that `SampleOrder` shuffles together."""
        if not self.source.reads_whole_blocks:
            return config.shuffle_window_images
        per_image = max(1.0, self.source.num_bytes / self.source.num_samples)
        return max(1, min(config.shuffle_window_images, int(config.shuffle_window_mib * 2**20 / per_image)))

    def fingerprint(self) -> str:
        """Return the digest of the training source."""
        return self.source.fingerprint()

    def training_parts(self, config: DataConfig) -> dict[str, str]:
        """Return the parts of the run's identity that describe the training images and their order, by name.

        The order also depends on the seed and on the images per step, which are settings. Computes no epoch.
        """
        block_starts, order = self.source.block_starts, "one permutation"
        if block_starts is not None:
            window = min(self.shuffle_window_images(config), len(self.training_ids))
            order = f"{len(block_starts)} blocks {_digest(block_starts)}, windows of {window} images"
        return {
            "training data": self.fingerprint(),
            "training source": f"{self.source.num_samples} images",
            "training images": f"{len(self.training_ids)} images {_digest(self.training_ids)}",
            "training order": order,
        }

    def test_parts(self) -> dict[str, str]:
        """Return what an evaluation depends on, by name: the test source, and the test images."""
        is_split = self.test_source is self.source
        return {
            "test data": "held out of the training data" if is_split else self.test_source.fingerprint(),
            "test images": f"{len(self.test_ids)} images {_digest(self.test_ids)}",
        }


def open_dataset(config: DataConfig, *, fingerprint: str | None = None, test_data: str | None = None) -> Dataset:
    """Open the sources and split off the held-out images.

    Args:
        config: names the sources.
        fingerprint: `Dataset.fingerprint` when the run was prepared. None: no check.
        test_data: "test data" of `Dataset.test_parts` when the run was prepared. None: no check.

    Raises:
        DataError: a source cannot be used, or has fewer images than asked for.
        ChangedDataError: the source, or the test source, has other images than when the run was prepared.
    """
    source = open_source(config.source, config)
    _check_unchanged(f"data.source={config.source!r}", source, fingerprint)
    training_ids, test_ids = split_source(config, source)
    if config.test_source is None:
        return Dataset(source=source, training_ids=training_ids, test_source=source, test_ids=test_ids)
    test_source = open_source(config.test_source, config)
    _check_unchanged(f"data.test_source={config.test_source!r}", test_source, test_data)
    test_ids = np.arange(test_source.num_samples, dtype=np.int64)
    return Dataset(source=source, training_ids=training_ids, test_source=test_source, test_ids=test_ids)


def _check_unchanged(setting: str, source: Source, fingerprint: str | None) -> None:
    if fingerprint is not None and source.fingerprint() != fingerprint:
        raise ChangedDataError(
            f"{setting} has changed since the run was started: it has {source.num_samples} images now, with other names or "
            f"sizes. Restore removed files and remove new ones, then start the run again with its name"
        )


def split_source(config: DataConfig, source: Source) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the training ids and the held-out ids of `source`, both ascending. Other ids are unused.

    Raises:
        DataError: the source has fewer images than asked for.
    """
    ids = choose_subset(source.num_samples, config.num_images)
    holds_out = config.test_source is None and source.has_labels
    return split_for_test(ids, config.test_fraction if holds_out else 0.0)


def have_same_images(one: Source, other: Source) -> bool:
    """Tell whether two sources hold the same images, by their fingerprints and the bytes of three images.

    A fingerprint covers names and sizes only, so numbered files of equal size share it.

    Raises:
        OSError: the storage failed.
    """
    if one is other:
        return True
    if one.fingerprint() != other.fingerprint():
        return False
    return _read_sample(one) == _read_sample(other)


def sample_digest(source: Source) -> str:
    """Return a digest of the bytes of the three images that `have_same_images` compares.

    Raises:
        OSError: the storage failed.
    """
    return hashlib.sha256(b"".join(hashlib.sha256(image).digest() for image in _read_sample(source))).hexdigest()


def _read_sample(source: Source) -> list[bytes]:
    return source.read(sorted({0, source.num_samples // 2, source.num_samples - 1}))


def _digest(ids: NDArray[np.int64]) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
