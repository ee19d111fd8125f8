"""Class tokens of several blocks equal those of a manual forward pass; k-NN agrees with other libraries."""

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import knn_predict
from sklearn.neighbors import KNeighborsClassifier

from hvp_ray.config import BackboneConfig
from hvp_ray.errors import ConfigError, TrainingError
from hvp_ray.evaluation.features import check_last_blocks, extract_features
from hvp_ray.evaluation.knn import knn_accuracy, knn_correct
from hvp_ray.methods.backbones import build_backbone
from hvp_ray.views.normalise import normalise_views
from tests.helpers import views_config

CPU = torch.device("cpu")
VIT = BackboneConfig(name="vit_tiny_patch16_224", patch_px=4, image_px=8, depth=3, dim=24, num_heads=2)


@pytest.fixture
def pixels(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def test_features_of_diverged_weights_are_refused(pixels: np.ndarray) -> None:
    network = build_backbone(VIT)
    with torch.no_grad():
        network.norm.weight[3] = float("nan")
    with pytest.raises(TrainingError, match="features of 5 of 5 images are not finite.*diverged"):
        extract_features(network, pixels, views_config(8), device=CPU)


@pytest.mark.parametrize("last_blocks", [1, 2, 3])
def test_last_blocks_are_class_tokens_after_the_final_norm(pixels: np.ndarray, last_blocks: int) -> None:
    views, network = views_config(8), build_backbone(VIT).eval()
    # Norms that do something: fresh ones are all alike.
    torch.nn.init.normal_(network.norm.weight)
    found = extract_features(network, pixels, views, device=CPU, last_blocks=last_blocks)
    tokens = network._pos_embed(network.patch_embed(normalise_views(torch.from_numpy(pixels), views)))
    class_tokens = []
    for block in network.blocks:
        tokens = block(tokens)
        class_tokens.append(network.norm(tokens)[:, 0])
    torch.testing.assert_close(found, torch.cat(class_tokens[-last_blocks:], dim=1))
    assert found.shape == (5, 24 * last_blocks)


def test_last_block_is_at_the_end(pixels: np.ndarray) -> None:
    views, network = views_config(8), build_backbone(VIT)
    several = extract_features(network, pixels, views, device=CPU, last_blocks=3)
    torch.testing.assert_close(several[:, -24:], extract_features(network, pixels, views, device=CPU))


def test_last_blocks_that_are_not_there_are_refused(pixels: np.ndarray) -> None:
    resnet = build_backbone(BackboneConfig(name="resnet10", stem="cifar", channels=(4, 4, 8, 8)))
    assert extract_features(resnet, pixels, views_config(8), device=CPU).shape == (5, 8)
    with pytest.raises(ConfigError, match="last_blocks=4.*ResNet has no class token"):
        extract_features(resnet, pixels, views_config(8), device=CPU, last_blocks=4)
    for number in (0, 4):
        with pytest.raises(ConfigError, match=f"last_blocks={number}.*1 to 3"):
            check_last_blocks(build_backbone(VIT), number)


@pytest.mark.parametrize("k", [1, 10, 50])
def test_knn_is_that_of_scikit_learn_and_of_lightly(generator: np.random.Generator, k: int) -> None:
    centres = generator.normal(size=(5, 16))
    labels, truth = generator.integers(0, 5, 200), generator.integers(0, 5, 150)
    bank = centres[labels] + generator.normal(size=(200, 16)) * 1.4
    queries = centres[truth] + generator.normal(size=(150, 16)) * 1.4
    tensors = [torch.from_numpy(array) for array in (bank, labels, queries, truth)]
    correct = knn_correct(*tensors, neighbours=k)
    assert knn_accuracy(*tensors, neighbours=k) == pytest.approx(correct.double().mean().item())

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1.0 - distances) / 0.07)

    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(bank, labels)
    assert np.array_equal(correct.numpy(), oracle.predict(queries) == truth)
    normalised = [torch.nn.functional.normalize(tensor, dim=1) for tensor in (tensors[0], tensors[2])]
    predicted = knn_predict(normalised[1], normalised[0].T, tensors[1], num_classes=5, knn_k=k, knn_t=0.07)
    assert np.array_equal(correct.numpy(), predicted[:, 0].numpy() == truth)
