"""Test order, cache and errors of features in this process. `tests/ray/test_feature_pool.py` tests them under Ray."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvp_ray.config import BackboneConfig, DataConfig
from hvp_ray.data.source import open_source
from hvp_ray.errors import CheckpointError, ConfigError, DataError
from hvp_ray.evaluation import feature_pool
from hvp_ray.evaluation.feature_pool import (
    FeatureCache,
    FeatureRequest,
    Workers,
    feature_key,
    pool_features,
    start_workers,
)
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.methods.backbones import export_backbone, load_exported_backbone
from tests.helpers import ProgramInAPickle, encode, photograph_like, views_config
from tests.unit.data.made import write_folder

BACKBONE = BackboneConfig(name="resnet10", stem="cifar", channels=(4, 4, 8, 8))


@pytest.fixture
def request_of_digits(tmp_path: Path) -> FeatureRequest:
    from hvp_ray.methods.backbones import build_backbone

    path = tmp_path / "backbone.safetensors"
    export_backbone(build_backbone(BACKBONE), BACKBONE, path)
    return FeatureRequest(
        backbone_path=path,
        data=DataConfig(source="digits"),
        views=views_config(8),
        part="training",
        sample_ids=np.arange(40, 0, -1),
    )


def _count_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the size of every chunk that is extracted rather than cached."""
    extract, seen = feature_pool._extract_chunk, []

    def counting(weights: np.ndarray, request: FeatureRequest, sample_ids: np.ndarray, device: str) -> object:
        seen.append(len(sample_ids))
        return extract(weights, request, sample_ids, device)

    monkeypatch.setattr(feature_pool, "_extract_chunk", counting)
    return seen


def test_features_are_those_of_the_images_in_the_order_asked_for(
    request_of_digits: FeatureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_pool, "IMAGES_PER_TASK", 16)
    seen: list[tuple[int, int]] = []
    found = pool_features(request_of_digits, report_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(14, 40), (27, 40), (40, 40)]
    assert found.sample_ids.tolist() == list(range(40, 0, -1))
    source = open_source("digits", request_of_digits.data)
    pixels, _ = load_evaluation_pixels(source, found.sample_ids, request_of_digits.views, request_of_digits.data)
    backbone = load_exported_backbone(request_of_digits.backbone_path)
    expected = extract_features(backbone, pixels, request_of_digits.views, device=torch.device("cpu"))
    assert np.allclose(found.features, expected.numpy(), atol=1e-5)


def test_cache_hit_extracts_nothing_and_gives_the_same(
    request_of_digits: FeatureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, cache = _count_chunks(monkeypatch), FeatureCache(tmp_path / "features")
    first = pool_features(request_of_digits, cache=cache)
    second = pool_features(request_of_digits, cache=cache)
    assert chunks == [40]
    assert np.array_equal(first.features, second.features)
    assert np.array_equal(first.sample_ids, second.sample_ids)
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_changed_byte_of_the_backbone_misses_the_cache(
    request_of_digits: FeatureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, cache = _count_chunks(monkeypatch), FeatureCache(tmp_path / "features")
    pool_features(request_of_digits, cache=cache)
    content = bytearray(request_of_digits.backbone_path.read_bytes())
    content[-1] ^= 1
    request_of_digits.backbone_path.write_bytes(content)
    pool_features(request_of_digits, cache=cache)
    assert chunks == [40, 40]


def test_key_depends_on_all_that_features_depend_on_and_on_nothing_else(request_of_digits: FeatureRequest) -> None:
    def key(request: FeatureRequest, weights: bytes = b"w", **changed: str) -> str:
        return feature_key(request, weights, **({"fingerprint": "f", "content": "c", "device": "cpu"} | changed))

    request, replace = request_of_digits, dataclasses.replace
    other_views = [
        replace(request.views, evaluation_resize_px=9),
        replace(request.views, evaluation_interpolation="bicubic"),
        replace(request.views, mean=(0.1, 0.2, 0.3)),
        replace(request.views, std=(0.1, 0.2, 0.3)),
        views_config(12),
    ]
    keys = [
        key(request),
        key(request, weights=b"v"),
        key(request, fingerprint="g"),
        key(request, content="d"),
        key(request, device="cuda"),
        key(replace(request, sample_ids=np.arange(1, 41))),
        key(replace(request, last_blocks=2)),
        key(replace(request, data=replace(request.data, max_image_pixels=10))),
        key(replace(request, data=replace(request.data, source="elsewhere"))),
        key(replace(request, data=replace(request.data, test_source="elsewhere too"), part="test")),
        *[key(replace(request, views=views)) for views in other_views],
    ]
    assert len(set(keys)) == len(keys)
    assert key(replace(request, backbone_path=Path("elsewhere"), part="test")) == keys[0]
    assert key(replace(request, data=replace(request.data, test_source="elsewhere too"))) == keys[0]


def test_images_of_equal_names_and_sizes_do_not_share_features(
    request_of_digits: FeatureRequest, tmp_path: Path, generator: np.random.Generator
) -> None:
    """Uncompressed images of one size have files of one size, and a fingerprint covers names and sizes only."""

    def write(folder: str) -> Path:
        return write_folder(tmp_path / folder, [encode(photograph_like(generator, 12, 12), "BMP") for _ in range(6)])

    training, test = write("train"), write("test")
    data = DataConfig(source=str(training), test_source=str(test))
    request = dataclasses.replace(request_of_digits, data=data, sample_ids=np.arange(6))
    cache = FeatureCache(tmp_path / "features")

    def features(part: Literal["training", "test"]) -> NDArray[np.float32]:
        return pool_features(dataclasses.replace(request, part=part), cache=cache).features

    of_training, of_test = features("training"), features("test")
    assert not np.allclose(of_training, of_test)
    write("train")
    assert not np.allclose(features("training"), of_training)
    assert np.array_equal(features("test"), of_test)


def test_damaged_cache_file_is_computed_again(
    request_of_digits: FeatureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path / "features")
    first = pool_features(request_of_digits, cache=cache)
    (path,) = (tmp_path / "features").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(pool_features(request_of_digits, cache=cache).features, first.features)
    assert "computed again" in caplog.text
    path.write_bytes(b"")
    assert np.array_equal(pool_features(request_of_digits, cache=cache).features, first.features)


def test_unreadable_images_are_left_out(request_of_digits: FeatureRequest, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(6):
        folder = tmp_path / "images" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(encode(photograph_like(generator, 20, 20)))
    source = DataConfig(source=str(tmp_path / "images"))
    (tmp_path / "images" / "class0" / "2.png").write_bytes(b"no image")
    request = dataclasses.replace(request_of_digits, data=source, sample_ids=np.arange(6))
    found = pool_features(request)
    assert len(found.sample_ids) == len(found.features) == 5
    missing = set(range(6)) - set(found.sample_ids.tolist())
    with pytest.raises(DataError, match="none of the 1 training images"):
        pool_features(dataclasses.replace(request, sample_ids=np.array(list(missing))))
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="reading 1 images from .* failed 4 times"):
        pool_features(request)


def test_errors_say_what_is_wrong(request_of_digits: FeatureRequest, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing.safetensors cannot be read"):
        pool_features(dataclasses.replace(request_of_digits, backbone_path=tmp_path / "nothing.safetensors"))
    with pytest.raises(ConfigError, match="last_blocks=2"):
        pool_features(dataclasses.replace(request_of_digits, last_blocks=2))
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="cannot be written"):
        pool_features(request_of_digits, cache=FeatureCache(tmp_path / "file"))
    with pytest.raises(ConfigError, match="num_workers=0"):
        pool_features(request_of_digits, Workers(num_workers=0))


def test_one_worker_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with start_workers(1, "cpu") as workers:
        assert (workers.num_workers, workers.device, workers.gpus_per_worker) == (1, "cpu", 0.0)
        assert not feature_pool.ray.is_initialized()


def test_hostile_features_are_computed_again_and_run_no_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proof = tmp_path / "proof"
    ids = np.arange(3)
    np.savez(tmp_path / "program.npz", features=np.array([ProgramInAPickle(proof)] * 3), sample_ids=ids)
    np.savez_compressed(tmp_path / "bomb.npz", features=np.zeros((3, 2**22), np.float32), sample_ids=ids)
    np.savez(tmp_path / "other.npz", features=np.zeros((5, 2), np.float32), sample_ids=ids)
    np.savez(tmp_path / "lie.npz", features=np.zeros((3, 2), np.float32), sample_ids=ids)
    with zipfile.ZipFile(tmp_path / "lie.npz") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(b"(3, 2), }" + b" " * 13, b"(3, 2000000000000), }" + b" "))
    cache = FeatureCache(tmp_path)
    for name in ("program", "bomb", "other", "lie"):
        caplog.clear()
        assert cache.load(name) is None
        assert "are computed again" in caplog.text
    assert not proof.exists()
    cache.write("own", feature_pool.ImageFeatures(features=np.ones((3, 2), np.float32), sample_ids=ids))
    assert cache.load("own") is not None
