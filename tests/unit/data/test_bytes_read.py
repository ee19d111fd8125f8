"""Bytes read / bytes used over a whole epoch of data that are larger than the cache, with several view workers on a node.

The view workers of a node are sources of their own here, as they are in their processes: they share nothing but the cache on
the disk. The proportions of the defaults are kept (a cache of four windows), and everything is a thousand times smaller. A
fifth of the images is held out, as by default: row groups are read with them.
"""

from pathlib import Path

import numpy as np
import pytest

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.order import SampleOrder
from hvp_ray.data.source import open_source
from tests.unit.data.made import draw_images, pack_here, write_parquet

NUM_IMAGES = 3_000
DEFAULTS = DataConfig(source="x")


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    generator = np.random.default_rng(2)
    few = draw_images(50, generator)  # most of each image is noise behind it, which no codec makes smaller
    return [few[index % 50] + generator.bytes(int(generator.integers(500, 7_000))) for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def parquet(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parquet")
    for index in range(3):
        write_parquet(root / f"train-{index}.parquet", images[index * 1_000 : (index + 1) * 1_000], row_group_size=100)
    return root


@pytest.fixture(scope="module")
def packed(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "shards"
    pack_here(parquet, target, shard_mib=4)
    return target


def _ratio(source: str, num_workers: int, images: list[bytes], **options: int) -> float:
    config = DataConfig(source=source, **options)  # type: ignore[arg-type]
    dataset = open_dataset(config)
    order = SampleOrder(
        seed=1,
        sample_ids=dataset.training_ids,
        images_per_step=60,
        block_starts=dataset.source.block_starts,
        window_images=dataset.shuffle_window_images(config),
    )
    workers = [open_source(source, config) for _ in range(num_workers)]
    used = 0
    for step in range(order.steps_per_epoch):
        ids = order.sample_ids_of_step(step).tolist()
        read = workers[step % num_workers].read(ids)
        assert read == [images[sample_id] for sample_id in ids]
        used += sum(map(len, read))
    return sum(worker.num_bytes_read for worker in workers) / used  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_parquet_is_read_once_by_all_workers_of_a_node(parquet: Path, images: list[bytes], num_workers: int) -> None:
    assert DEFAULTS.block_cache_mib == 4 * DEFAULTS.shuffle_window_mib
    ratio = _ratio(str(parquet), num_workers, images, block_cache_mib=4, shuffle_window_mib=1)
    print(f"\nParquet, {num_workers} workers: bytes read / bytes used = {ratio:.3f}")
    assert ratio <= 1.5


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_shards_are_read_image_by_image(images: list[bytes], packed: Path, num_workers: int) -> None:
    ratio = _ratio(str(packed), num_workers, images, block_cache_mib=1, shuffle_window_images=1_000)
    print(f"\nshards, {num_workers} workers: bytes read / bytes used = {ratio:.3f}")
    assert ratio <= 1.1


def test_window_is_bounded_by_bytes_where_blocks_are_read_whole(parquet: Path, packed: Path) -> None:
    config = DataConfig(source=str(parquet), shuffle_window_mib=2)
    dataset = open_dataset(config)
    per_image = dataset.source.num_bytes / dataset.source.num_samples
    assert dataset.shuffle_window_images(config) == int(2 * 2**20 / per_image)
    small = DataConfig(source=str(parquet), shuffle_window_images=7)
    assert dataset.shuffle_window_images(small) == 7
    assert open_dataset(DataConfig(source=str(packed))).shuffle_window_images(config) == 65_536


def test_cache_does_not_take_changed_files_for_what_they_were(tmp_path: Path) -> None:
    """Only the images change, not names, sizes and row groups."""
    path = write_parquet(tmp_path / "a.parquet", [b"one" * 90, b"two" * 90], row_group_size=1)
    before = open_source(str(path), DataConfig(source=str(path)))
    assert before.read([0, 1]) == [b"one" * 90, b"two" * 90]
    path.write_bytes(path.read_bytes().replace(b"one", b"eno"))
    after = open_source(str(path), DataConfig(source=str(path)))
    assert after.fingerprint() == before.fingerprint()
    assert after.read([0, 1]) == [b"eno" * 90, b"two" * 90]
