"""The evaluation after training copies neither all images to floats nor their bytes a second time."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from hvp_ray.config import DataConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.costs.memory import _LiveBytes
from hvp_ray.data.source import open_source
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.evaluation.knn import few_shot_knn_accuracy, knn_accuracy, knn_correct
from hvp_ray.evaluation.report import KnnData, evaluate_pixels
from tests.helpers import tiny_config

MIB = 2**20


def _knn_data(generator: np.random.Generator, num_images: int, size_px: int) -> KnnData:
    labels = np.arange(num_images, dtype=np.int64) % 10
    pixels = generator.integers(0, 256, (2, num_images, size_px, size_px, 3), dtype=np.uint8)
    return KnnData(bank=pixels[0], bank_labels=labels, queries=pixels[1], query_labels=labels)


def test_pixel_baseline_makes_no_float_of_every_pixel(generator: np.random.Generator, tmp_path: Path) -> None:
    """300 + 300 images of 224 px are 86 MiB; as floats they would be 345 MiB, and normalised as much again."""
    data = _knn_data(generator, 300, 224)
    with _LiveBytes() as live:
        result = evaluate_pixels(data, tiny_config(str(tmp_path)))
    assert set(result) == {"top1", "5shot"}
    floats_of_32_px = 2 * 300 * 32 * 32 * 3 * 4
    assert live.peak < 86 * MIB + 3 * floats_of_32_px + 40 * MIB


@pytest.mark.parametrize("size_px", [8, 32])
def test_pixel_baseline_of_small_images_is_that_of_all_their_pixels(
    generator: np.random.Generator, tmp_path: Path, size_px: int
) -> None:
    data, config = _knn_data(generator, 60, size_px), tiny_config(str(tmp_path))
    labels = torch.from_numpy(data.bank_labels)
    bank, queries = (torch.from_numpy(pixels).flatten(1).float() for pixels in (data.bank, data.queries))
    assert evaluate_pixels(data, config) == {
        "top1": knn_accuracy(bank, labels, queries, labels, neighbours=config.tracking.knn_neighbours),
        "5shot": few_shot_knn_accuracy(bank, labels, queries, labels, shots=5),
    }


def test_pixel_baseline_of_large_images_is_that_of_small_copies(generator: np.random.Generator, tmp_path: Path) -> None:
    """Enlarging every pixel to a block of 4 x 4 changes nothing."""
    small, config = _knn_data(generator, 60, 32), tiny_config(str(tmp_path))
    bank, queries = (pixels.repeat(4, axis=1).repeat(4, axis=2) for pixels in (small.bank, small.queries))
    large = dataclasses.replace(small, bank=bank, queries=queries)
    assert evaluate_pixels(large, config)["top1"] == pytest.approx(evaluate_pixels(small, config)["top1"], abs=0.1)


def test_similarities_of_a_large_bank_come_in_small_parts() -> None:
    bank, labels = torch.randn(200_000, 2), torch.arange(200_000) % 10
    queries, truth = torch.randn(1024, 2), torch.arange(1024) % 10
    with _LiveBytes() as live:
        knn_correct(bank, labels, queries, truth, neighbours=20)
    assert live.peak < 2 * 256 * MIB  # 1,024 rows of similarities would be 781 MiB


def test_crops_are_held_once() -> None:
    views = ViewsConfig(global_views=ViewGroupConfig(size_px=128), evaluation_resize_px=128)
    data = DataConfig(source="digits")
    source = open_source("digits", data)
    ids = np.arange(200, dtype=np.int64)
    load_evaluation_pixels(source, ids[:1], views, data)
    tracemalloc.start()
    pixels, _ = load_evaluation_pixels(source, ids, views, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * pixels.nbytes


def test_features_of_many_images_come_in_parts() -> None:
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    pixels = np.zeros((2048, 32, 32, 3), np.uint8)
    views = ViewsConfig(global_views=ViewGroupConfig(size_px=32), evaluation_resize_px=32)
    with _LiveBytes() as live:
        extract_features(network, pixels, views, device=torch.device("cpu"))
    assert live.peak < pixels.nbytes + 3 * 512 * 32 * 32 * 3 * 4
