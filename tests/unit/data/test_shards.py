"""Packed shards return exactly the packed bytes. Damaged or hostile shards are refused."""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.order import SampleOrder
from hvp_ray.data.shard_format import BLOCK_DTYPE, manifest_from_json, manifest_to_json
from hvp_ray.data.shards import ShardSource
from hvp_ray.data.source import UNLABELLED
from hvp_ray.errors import DataError, LabelError
from hvp_ray.records import BatchRequest, ViewBatch
from hvp_ray.stream.reading import read_images
from hvp_ray.stream.render_batch import RenderContext, render_batch
from hvp_ray.views.render_cpu import CpuRenderer
from tests.helpers import views_config
from tests.unit.data.made import (
    content_of,
    draw_images,
    open_any,
    pack_here,
    write_folder,
    write_parquet,
)

NUM_IMAGES = 600


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return draw_images(NUM_IMAGES, np.random.default_rng(7))


@pytest.fixture(scope="module")
def packed(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    pack_here(write_folder(root / "folder", images), root / "shards")
    return root / "shards"


def _open(folder: Path, **options: object) -> ShardSource:
    source = open_any(folder, **options)
    assert isinstance(source, ShardSource)
    return source


def test_shards_give_the_images_that_were_packed(
    packed: Path, images: list[bytes], generator: np.random.Generator
) -> None:
    source = _open(packed)
    assert source.num_samples == NUM_IMAGES
    assert source.num_bytes == sum(map(len, images))
    assert source.read(range(NUM_IMAGES)) == images
    some = generator.integers(0, NUM_IMAGES, 300).tolist()  # in any order, some twice
    assert source.read(some) == [images[index] for index in some]
    assert source.load_labels().tolist() == [index * 3 // NUM_IMAGES for index in range(NUM_IMAGES)]
    assert source.load_class_names() == ("class-0", "class-1", "class-2")
    assert source.block_starts is not None
    assert np.diff(source.block_starts).max() <= 256


def test_any_arrow_library_reads_the_shards(packed: Path, images: list[bytes]) -> None:
    tables = [pa.ipc.open_file(path).read_all() for path in sorted(packed.glob("shard-*.arrow"))]
    table = pa.concat_tables(tables)
    assert table["image"].to_pylist() == images
    assert table["path"][599].as_py() == "class-2/00599.png"
    assert table["label"][0].as_py() == 0
    assert table["crc32"].to_pylist() == [zlib.crc32(image) for image in images]


def test_opening_reads_no_image(packed: Path) -> None:
    source = _open(packed)
    tables = sum((packed / name).stat().st_size for name in ("manifest.json", "blocks.bin"))
    assert source.has_labels
    assert source.num_bytes_read == tables


def test_large_images_count_as_unreadable(packed: Path, images: list[bytes]) -> None:
    files = _open(packed)._files
    source = ShardSource(files, cache_bytes=0, max_image_bytes=900)
    assert source.read(range(NUM_IMAGES)) == [image if len(image) <= 900 else b"" for image in images]


def test_moved_shards_have_the_same_fingerprint_and_others_do_not(
    packed: Path, tmp_path: Path, images: list[bytes]
) -> None:
    _copy(packed, tmp_path / "moved")
    assert _open(tmp_path / "moved").fingerprint() == _open(packed).fingerprint()
    pack_here(write_folder(tmp_path / "folder", images[::-1]), tmp_path / "other")
    assert _open(tmp_path / "other").fingerprint() != _open(packed).fingerprint()


def _batches(folder: Path, num_steps: int, order_of: SampleOrder | None = None) -> tuple[list[ViewBatch], SampleOrder]:
    config = DataConfig(source=str(folder), shuffle_window_images=200)
    dataset = open_dataset(config)
    views = views_config(16)
    context = RenderContext(
        seed=3,
        source=dataset.source,
        training_ids=dataset.training_ids,
        data=config,
        views=views,
        renderer=CpuRenderer(views, DataConfig(source="list")),
    )
    order = order_of or SampleOrder(
        seed=3,
        sample_ids=dataset.training_ids,
        images_per_step=16,
        block_starts=dataset.source.block_starts,
        window_images=dataset.shuffle_window_images(config),
    )
    requests = [
        BatchRequest(
            step=step, epoch=0, first_position=16 * step, sample_ids=order.sample_ids_of_step(step), num_views=2
        )
        for step in range(num_steps)
    ]
    return [render_batch(context, request) for request in requests], order


def test_batches_of_folder_parquet_and_shards_are_equal_to_the_bit(
    tmp_path: Path, packed: Path, images: list[bytes]
) -> None:
    folder = write_folder(tmp_path / "folder", images)
    blocks = open_any(packed).block_starts
    assert blocks is not None
    sizes = np.diff(np.append(blocks, NUM_IMAGES)).tolist()
    for index, size in enumerate(sizes):  # row groups as the blocks are
        first = sum(sizes[:index])
        write_parquet(
            tmp_path / "parquet" / f"{index}.parquet",
            images[first : first + size],
            row_group_size=size,
            first=first,
            total=NUM_IMAGES,
        )
    of_shards, order = _batches(packed, 5)
    of_parquet, _ = _batches(tmp_path / "parquet", 5)  # its own order is the same
    of_folder, _ = _batches(folder, 5, order)
    for one, *others in zip(of_shards, of_parquet, of_folder, strict=True):
        assert not one.replacements
        for other in others:
            assert np.array_equal(one.sample_ids, other.sample_ids)
            assert np.array_equal(one.global_views.pixels, other.global_views.pixels)


def _copy(packed: Path, to: Path) -> Path:
    to.mkdir()
    for name, content in content_of(packed).items():
        (to / name).write_bytes(content)
    return to


def test_damaged_image_is_an_error_that_names_it_and_not_another_image(
    packed: Path, tmp_path: Path, images: list[bytes]
) -> None:
    folder = _copy(packed, tmp_path / "copy")
    shard = folder / "shard-000000-0000.arrow"
    content = bytearray(shard.read_bytes())
    content[content.find(images[40]) + 20] ^= 1
    shard.write_bytes(content)
    source = _open(folder)
    assert source.read([39, 41]) == [images[39], images[41]]
    with pytest.raises(DataError, match=r"shard-000000-0000.arrow row 40 is damaged.*hvp-ray pack --verify"):
        source.read([39, 40, 41])


def test_damaged_offsets_are_an_error(packed: Path, tmp_path: Path) -> None:
    folder = _copy(packed, tmp_path / "copy")
    at = int(np.frombuffer((folder / "blocks.bin").read_bytes(), BLOCK_DTYPE)["offsets_at"][0])
    shard = folder / "shard-000000-0000.arrow"
    content = bytearray(shard.read_bytes())
    content[at + 8] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="block 0 is damaged"):
        _open(folder).read([0])


@pytest.mark.parametrize("name", ["shard-000000-0000.arrow", "blocks.bin", "labels.bin"])
@pytest.mark.parametrize("change", ["cut", "longer", "gone"])
def test_missing_and_cut_files_are_named_at_once(packed: Path, tmp_path: Path, name: str, change: str) -> None:
    folder = _copy(packed, tmp_path / "copy")
    content = (folder / name).read_bytes()
    if change == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[:-1] if change == "cut" else content + b"x")
    with pytest.raises(DataError, match=rf"{name}: expected {len(content)} bytes"):
        _open(folder).load_labels()


def test_file_that_becomes_shorter_is_a_failure_of_the_storage(packed: Path, tmp_path: Path) -> None:
    source = _open(_copy(packed, tmp_path / "copy"))
    (tmp_path / "copy" / "shard-000000-0000.arrow").write_bytes(b"")
    with pytest.raises(OSError, match="ends .* bytes too early"):
        source.read([0])
    with pytest.raises(DataError, match="failed 4 times"):
        read_images(source, [0])


Change = Callable[[dict[str, Any]], object]
HOSTILE: dict[str, tuple[Change, str]] = {
    "path": (lambda m: m["shards"][0].update(name="../../etc/passwd"), "is not the name of a shard"),
    "absolute": (lambda m: m["shards"][0].update(name="/etc/passwd"), "is not the name of a shard"),
    "no name": (lambda m: m["shards"][0].update(name=["x"]), "is not the name of a shard"),
    "twice": (lambda m: m["shards"].append(m["shards"][0] | {"rows": 0}), "do not add up"),
    "rows": (lambda m: m["shards"][0].update(rows=10**9), "do not add up"),
    "negative": (lambda m: m["shards"][0].update(rows=-1), "instead of a count"),
    "huge": (lambda m: m.update(num_images=10**30), "instead of a count"),
    "blocks": (lambda m: m.update(num_blocks=10**11), "blocks.bin: expected 4400000000000 bytes"),
    "float": (lambda m: m.update(num_images=1.5), "instead of a count"),
    "digest": (lambda m: m["shards"][0].update(sha256="x" * 64), "instead of a SHA-256"),
    "version": (lambda m: m.update(version=2), "of version 2"),
    "format": (lambda m: m.update(format="webdataset"), "is no manifest of packed shards"),
    "classes": (lambda m: m.update(class_names=[{}]), "instead of a name"),
    "missing": (lambda m: m.pop("labels_sha256"), "is damaged: KeyError"),
    "empty": (lambda m: m.update(shards=[], num_images=0), "is damaged"),
    "shards": (lambda m: m.update(shards=7), "is damaged"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_manifest_is_refused_with_a_reason(packed: Path, tmp_path: Path, name: str) -> None:
    folder = _copy(packed, tmp_path / "copy")
    change, message = HOSTILE[name]
    values = json.loads((folder / "manifest.json").read_bytes())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        _open(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000, b"\xff\xfe", b'{"format": "hvp_ray shards"}', b"7"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        _open(tmp_path)


def test_manifest_of_terabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="expected at most"):
        _open(tmp_path)


BLOCKS: dict[str, Callable[[Any], object]] = {
    "beyond the shard": lambda b: b["data_at"].__setitem__(0, 2**63),
    "of another shard": lambda b: b["shard"].__setitem__(-1, 9),
    "no rows": lambda b: b["rows"].__setitem__(0, 0),
    "many rows": lambda b: b["rows"].__setitem__(0, 2**31),
    "many bytes": lambda b: b["data_bytes"].__setitem__(0, 2**40),
    "offsets beyond": lambda b: b["offsets_at"].__setitem__(0, 2**40),
}


@pytest.mark.parametrize("name", list(BLOCKS))
def test_hostile_table_of_blocks_is_refused(packed: Path, tmp_path: Path, name: str) -> None:
    folder = _copy(packed, tmp_path / "copy")
    table = np.frombuffer((folder / "blocks.bin").read_bytes(), BLOCK_DTYPE).copy()
    BLOCKS[name](table)
    _replace_table(folder, "blocks", table.tobytes())
    with pytest.raises(DataError, match=r"blocks\.bin is damaged"):
        _open(folder)


def _replace_table(folder: Path, name: str, content: bytes) -> None:
    """Write a table with a digest that is right."""
    import hashlib

    (folder / f"{name}.bin").write_bytes(content)
    values = json.loads((folder / "manifest.json").read_bytes())
    values[f"{name}_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(values))


def test_hostile_labels_are_refused(packed: Path, tmp_path: Path) -> None:
    folder = _copy(packed, tmp_path / "copy")
    _replace_table(folder, "labels", np.full(NUM_IMAGES, 2**30, "<i4").tobytes())
    with pytest.raises(DataError, match="has labels from 1073741824"):
        _open(folder).load_labels()


def test_offsets_that_run_backwards_are_refused_although_their_checksum_is_right(packed: Path, tmp_path: Path) -> None:
    folder = _copy(packed, tmp_path / "copy")
    table = np.frombuffer((folder / "blocks.bin").read_bytes(), BLOCK_DTYPE).copy()
    rows, at, crc32_at = int(table["rows"][0]), int(table["offsets_at"][0]), int(table["crc32_at"][0])
    shard = folder / "shard-000000-0000.arrow"
    content = bytearray(shard.read_bytes())
    offsets = np.frombuffer(content, "<i4", rows + 1, at).copy()
    offsets[1] = 2**30
    content[at : at + 4 * rows + 4] = offsets.tobytes()
    shard.write_bytes(content)
    table["head_crc32"][0] = zlib.crc32(offsets.tobytes(), zlib.crc32(content[crc32_at : crc32_at + 4 * rows]))
    _replace_table(folder, "blocks", table.tobytes())
    with pytest.raises(DataError, match="block 0 is damaged"):
        _open(folder).read([0])


def test_manifest_survives_being_written_and_read(packed: Path) -> None:
    content = (packed / "manifest.json").read_bytes()
    assert manifest_to_json(manifest_from_json(content, "here")) == content


def test_images_without_labels_have_none(tmp_path: Path, images: list[bytes]) -> None:
    for index in range(3):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{index}.png").write_bytes(images[index])
    pack_here(tmp_path / "folder", tmp_path / "shards")
    source = _open(tmp_path / "shards")
    assert not source.has_labels
    with pytest.raises(LabelError, match="has no labels"):
        source.load_labels()
    (tmp_path / "folder" / "class").mkdir()
    (tmp_path / "folder" / "class" / "3.png").write_bytes(images[3])
    pack_here(tmp_path / "folder", tmp_path / "some")
    assert open_any(tmp_path / "some").load_labels().tolist() == [UNLABELLED] * 3 + [0]


def test_image_is_described_by_its_shard_and_row(packed: Path) -> None:
    source = _open(packed)
    assert re.fullmatch(r".*/shard-\d{6}-\d{4}\.arrow row \d+", source.describe(NUM_IMAGES - 1))
    assert source.describe(3).endswith("shard-000000-0000.arrow row 3")
