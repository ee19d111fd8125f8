"""k-NN equals a loop, and the preprocessing of features is torchvision's."""

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F

from hvp_ray.config import DataConfig, ViewGroupConfig, ViewsConfig
from hvp_ray.data.decode import decode_rgb
from hvp_ray.data.source import open_source
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.evaluation.knn import few_shot_knn_accuracy, knn_accuracy
from tests.helpers import encode, photograph_like


def _slow_knn(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray, k: int) -> float:
    correct = 0
    for query, label in zip(queries, truth, strict=True):
        similarity = bank @ query / (np.linalg.norm(bank, axis=1) * np.linalg.norm(query))
        votes: dict[int, float] = {}
        for row in np.argsort(-similarity)[:k]:
            votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + math.exp(similarity[row] / 0.07)
        correct += max(votes, key=lambda c: votes[c]) == label
    return correct / len(queries)


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_equals_a_loop(generator: np.random.Generator, k: int) -> None:
    centres = generator.normal(size=(4, 12))
    labels, truth = generator.integers(0, 4, 120), generator.integers(0, 4, 60)
    bank = centres[labels] + generator.normal(size=(120, 12)) * 1.5
    queries = centres[truth] + generator.normal(size=(60, 12)) * 1.5
    expected = _slow_knn(bank, labels, queries, truth, k)
    result = knn_accuracy(
        torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(queries), torch.from_numpy(truth),
        neighbours=k,
    )  # fmt: skip
    assert result == pytest.approx(expected)
    assert 0.3 < result < 1.0


def test_few_shots_are_fixed_draws_of_as_many_images_per_class(generator: np.random.Generator) -> None:
    labels = torch.arange(3).repeat(30)
    perfect = torch.nn.functional.one_hot(labels, 3).float()
    assert few_shot_knn_accuracy(perfect, labels, perfect, labels, shots=5) == 1.0
    noise = torch.from_numpy(generator.normal(size=(90, 8)))
    queries, truth = torch.randn(300, 8).double(), torch.arange(3).repeat(100)
    chance = few_shot_knn_accuracy(noise, labels, queries, truth, shots=5)
    assert chance == pytest.approx(1 / 3, abs=0.06)
    assert chance == few_shot_knn_accuracy(noise, labels, queries, truth, shots=5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_pixels_are_resize_and_centre_crop_of_torchvision(
    generator: np.random.Generator, tmp_path: Path, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    """Covers sizes whose longer side ends in a fraction of a pixel, and crops with an odd margin."""
    sizes = [(50, 50), (41, 50), (50, 43), (47, 90), (31, 33), (100, 37), (64, 48), (75, 100), (20, 20), (21, 29)]
    (tmp_path / "class").mkdir()
    for number, (height, width) in enumerate(sizes):
        image = encode(photograph_like(generator, height, width))
        (tmp_path / "class" / f"{number:02d}.png").write_bytes(image)
    group = ViewGroupConfig(size_px=17)
    views = ViewsConfig(global_views=group, evaluation_resize_px=20, evaluation_interpolation=interpolation)
    data = DataConfig(source=str(tmp_path))
    source = open_source(str(tmp_path), data)
    pixels, kept = load_evaluation_pixels(source, np.arange(len(sizes)), views, data)
    assert kept.tolist() == list(range(len(sizes)))
    for row, sample_id in enumerate(kept.tolist()):
        image = torch.from_numpy(decode_rgb(source.read([sample_id])[0], max_pixels=10**6)).permute(2, 0, 1)
        mode = F.InterpolationMode(interpolation)
        expected = F.center_crop(F.resize(image, [20], interpolation=mode, antialias=True), [17])
        assert np.array_equal(pixels[row], expected.permute(1, 2, 0).numpy()), sizes[row]


def test_features_are_those_of_evaluation_mode_and_the_mode_comes_back() -> None:
    views = ViewsConfig(global_views=ViewGroupConfig(size_px=8), evaluation_resize_px=8)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten()).train()
    pixels = np.random.default_rng(0).integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    features = extract_features(network, pixels, views, device=torch.device("cpu"))
    assert features.shape == (600, 192)
    assert network.training
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (views.mean, views.std))
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(features, expected.flatten(1), atol=1e-4, rtol=1e-4)
