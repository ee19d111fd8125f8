"""Parquet and shards at a URI (S3, the hub's protocol, fsspec) equal those on a disk, also if the storage fails."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.fs as pafs
import pytest

from hvp_ray.config import DataConfig
from hvp_ray.data.dataset import open_dataset
from hvp_ray.data.packing import verify_shards
from hvp_ray.data.source import Source
from hvp_ray.errors import ConfigError, DataError
from hvp_ray.files import OpenFile, StorageError, join_uri
from hvp_ray.stream.reading import read_images
from tests.s3_server import s3_server
from tests.unit.data.hub import Hub
from tests.unit.data.made import (
    content_of,
    draw_images,
    open_any,
    pack_here,
    upload,
    write_folder,
    write_parquet,
)

ROOT = Path(__file__).parents[3]
NUM_IMAGES = 400


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvp_ray.files._PAUSES_SECONDS", (0.01, 0.01))


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    generator = np.random.default_rng(5)
    return [
        image + generator.bytes(int(generator.integers(2_000, 9_000))) for image in draw_images(NUM_IMAGES, generator)
    ]


@pytest.fixture(scope="module")
def local(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `parquet/data/{train,test}-*.parquet` and `shards/`."""
    root = tmp_path_factory.mktemp("local")
    for index in range(2):
        part = images[index * 200 : (index + 1) * 200]
        path = root / "parquet" / "data" / f"train-{index}.parquet"
        write_parquet(path, part, row_group_size=40, first=200 * index, total=NUM_IMAGES)
    write_parquet(root / "parquet" / "data" / "test-0.parquet", images[:10], row_group_size=10)
    pack_here(write_folder(root / "folder", images), root / "shards")
    return root


@pytest.fixture(scope="module")
def s3(local: Path) -> Iterator[str]:
    with s3_server() as uri:
        for name in ("parquet", "shards"):
            upload(local / name, uri.format(f"/{name}"))
        yield uri


def _check_equal(remote: Source, here: Source, images: list[bytes]) -> None:
    assert remote.num_samples == here.num_samples == len(images)
    assert remote.fingerprint() == here.fingerprint()
    assert remote.num_bytes == here.num_bytes
    assert remote.load_labels().tolist() == here.load_labels().tolist()
    assert np.array_equal(remote.block_starts, here.block_starts)  # type: ignore[arg-type]
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    assert remote.read(order) == here.read(order) == [images[index] for index in order]


def test_parquet_on_a_bucket_equals_parquet_on_a_disk(s3: str, local: Path, images: list[bytes]) -> None:
    remote = open_any(s3.format("/parquet/data/train-*.parquet"))
    _check_equal(remote, open_any(local / "parquet" / "data" / "train-*.parquet"), images)
    assert remote.describe(205) == "s3://bucket/prefix/parquet/data/train-1.parquet row 5"
    one = s3.format("/parquet/data/train-0.parquet")
    assert open_any(one).read([7]) == [images[7]]


def test_shards_on_a_bucket_equal_shards_on_a_disk(s3: str, local: Path, images: list[bytes]) -> None:
    uri = s3.format("/shards")
    _check_equal(open_any(uri), open_any(local / "shards"), images)
    _check_equal(
        open_any(uri, block_cache_mib=1), open_any(local / "shards"), images
    )  # larger than the cache: by ranges


def test_opening_on_a_bucket_reads_footers_and_tables_only(s3: str, local: Path, images: list[bytes]) -> None:
    parquet = open_any(s3.format("/parquet/data/train-*.parquet"))
    assert parquet.num_bytes_read <= 2 * 65_536  # type: ignore[attr-defined]
    shards = open_any(s3.format("/shards"))
    tables = sum((local / "shards" / name).stat().st_size for name in ("manifest.json", "blocks.bin"))
    assert shards.num_bytes_read == tables  # type: ignore[attr-defined]


def test_images_larger_than_the_cache_cost_their_own_bytes(s3: str, images: list[bytes]) -> None:
    workers = [open_any(s3.format("/shards"), block_cache_mib=1) for _ in range(2)]
    order = np.random.default_rng(1).permutation(NUM_IMAGES)
    for step in range(10):
        workers[step % 2].read(order[40 * step : 40 * (step + 1)].tolist())
    ratio = sum(worker.num_bytes_read for worker in workers) / sum(map(len, images))  # type: ignore[attr-defined]
    print(f"\nshards on S3, 2 workers, opening included: bytes read / bytes used = {ratio:.3f}")
    assert ratio <= 1.2


def test_packing_from_and_to_a_bucket_gives_the_same_bytes(s3: str, local: Path, tmp_path: Path) -> None:
    pack_here(local / "parquet" / "data" / "train-*.parquet", tmp_path / "here")
    target = s3.format("/packed")
    source = s3.format("/parquet/data/train-*.parquet")
    pack_here(source, target, num_workers=2)
    filesystem, root = pafs.FileSystem.from_uri(target)
    there = {
        info.path.removeprefix(f"{root}/"): filesystem.open_input_stream(info.path).read()
        for info in filesystem.get_file_info(pafs.FileSelector(root))
    }
    assert there == content_of(tmp_path / "here")
    assert pack_here(source, target).was_complete
    verify_shards(target, lambda _done, _all: None)
    with pytest.raises(ConfigError, match="another source or other settings"):
        pack_here(local / "folder", target)


def test_several_splits_are_refused_with_patterns_that_can_be_used(s3: str) -> None:
    with pytest.raises(DataError, match=r"several splits \(train, test\)") as raised:
        open_any(s3.format("/parquet"))
    training, test = re.findall(r"'([^']+\*[^']+)'", str(raised.value))
    assert open_any(training).num_samples == NUM_IMAGES
    assert open_any(test).num_samples == 10


def test_what_cannot_be_used_on_a_bucket_says_why(s3: str, local: Path) -> None:
    upload(local / "folder" / "class-0", s3.format("/images"))
    cases = {
        s3.format("/images"): r"no WebDataset .* and no packed shards \(134 files.*hvp-ray pack FOLDER",
        s3.format("/absent"): "no Parquet files|does not exist|cannot be listed",
        s3.format("/parquet/*.txt"): "no Parquet files",
    }
    for uri, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_any(uri)
    with pytest.raises(ConfigError, match="carries credentials"):
        open_any("s3://key:secret@bucket/prefix")
    with pytest.raises(ConfigError, match="names no bucket"):
        open_any("gs://")


@pytest.mark.parametrize("name", ["parquet/data/train-*.parquet", "shards"])
def test_failures_of_the_storage_are_tried_again_and_are_never_damage(
    local: Path, images: list[bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    failures: list[Exception] = []
    read = OpenFile._read

    def read_or_fail(file: OpenFile, offset: int, num_bytes: int) -> bytes:
        if failures:
            raise failures.pop()
        return read(file, offset, num_bytes)

    monkeypatch.setattr(OpenFile, "_read", read_or_fail)
    uri = (local / name).as_uri().replace("%2A", "*")
    failures += [OSError("the network is down"), RuntimeError("an error of some library")]
    source = open_any(uri, block_cache_mib=1)  # tried again when it is opened
    assert not failures
    failures += [TimeoutError("too late"), RuntimeError("again")]
    assert read_images(source, [3, 250]).images == [images[3], images[250]]
    assert not failures
    failures += [OSError("it stays away")] * 100
    with pytest.raises(StorageError, match="it stays away"):
        source.read([120])
    with pytest.raises(DataError, match=r"failed 4 times.*it stays away.*start the run again"):
        read_images(source, [120])


def test_any_file_system_of_fsspec_serves(local: Path, images: list[bytes]) -> None:
    memory = fsspec.filesystem("memory")
    for name, content in content_of(local / "parquet").items():
        memory.pipe_file(f"/{name}", content)
    for name, content in content_of(local / "shards").items():
        memory.pipe_file(f"/shards/{name}", content)
    _check_equal(
        open_any("fsspec+memory:///data/train-*.parquet"), open_any(local / "parquet/data/train-*.parquet"), images
    )
    _check_equal(open_any("fsspec+memory:///shards"), open_any(local / "shards"), images)


_READ_HUB = """
import hashlib, sys
from hvp_ray.config import DataConfig
from hvp_ray.data.source import open_source
source = open_source(sys.argv[1], DataConfig(source=sys.argv[1], block_cache_mib=int(sys.argv[2])))
opened = source.num_bytes_read
ids = list(map(int, sys.argv[3].split(",")))
digest = hashlib.sha256(b"".join(source.read(ids))).hexdigest()
print(source.num_samples, sum(source.load_labels()), source.fingerprint(), digest, opened, source.num_bytes_read)
"""


@pytest.mark.parametrize(("name", "cache_mib"), [("parquet/data/train-*.parquet", 64), ("shards", 64), ("shards", 1)])
def test_hub_gives_what_is_there_in_ranges_of_bytes(
    local: Path, images: list[bytes], name: str, cache_mib: int
) -> None:
    import hashlib

    hub = Hub(local)
    try:
        hub.num_failures_left = 1
        child = subprocess.run(
            [sys.executable, "-c", _READ_HUB, f"hf://datasets/owner/name/{name}", str(cache_mib), "3,250,399"],
            env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"},
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        hub.close()
    assert child.returncode == 0, child.stderr[-2000:]
    count, labels, fingerprint, digest, opened, read = child.stdout.split()
    here = open_any(local / name)
    assert (int(count), int(labels)) == (NUM_IMAGES, int(here.load_labels().sum()))
    assert fingerprint == here.fingerprint()
    assert digest == hashlib.sha256(images[3] + images[250] + images[399]).hexdigest()
    assert int(opened) <= 2 * 65_536
    assert hub.num_bytes == int(read)  # nothing was read ahead
    if cache_mib == 1:
        assert int(read) - int(opened) < 60_000


def test_a_run_goes_on_when_its_data_move_to_a_bucket(s3: str, local: Path) -> None:
    """Fingerprint and order do not depend on the location of the files."""
    here, there = (
        open_dataset(DataConfig(source=uri, test_fraction=0.1)) for uri in (str(local / "shards"), s3.format("/shards"))
    )
    assert here.fingerprint() == there.fingerprint()
    assert np.array_equal(here.training_ids, there.training_ids)
    for name in ("/parquet/data/train-*.parquet", "/shards"):
        config = DataConfig(source=join_uri(s3.format(""), "x"))
        remote, disk = (
            open_dataset(DataConfig(source=s3.format(name))),
            open_dataset(DataConfig(source=f"{local}{name}")),
        )
        assert remote.shuffle_window_images(config) == disk.shuffle_window_images(config)
