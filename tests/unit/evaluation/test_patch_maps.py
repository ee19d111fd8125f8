"""Attention maps equal a manual softmax; colours are principal components, as scikit-learn finds them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from hvp_ray.config import BackboneConfig
from hvp_ray.evaluation.patch_maps import PatchMaps, compute_patch_maps, has_patch_maps, principal_components
from hvp_ray.methods.backbones import build_backbone
from hvp_ray.tracking.patch_figure import draw_patch_maps
from hvp_ray.views.normalise import normalise_views
from tests.helpers import views_config

CPU = torch.device("cpu")
VIT = BackboneConfig(name="vit_tiny_patch16_224", patch_px=4, image_px=8, depth=2, dim=24, num_heads=3)


@pytest.mark.parametrize("size_px", [8, 16])
def test_attention_is_the_softmax_of_the_last_block(generator: np.random.Generator, size_px: int) -> None:
    pixels = generator.integers(0, 256, (3, size_px, size_px, 3), dtype=np.uint8)
    views, network = views_config(size_px), build_backbone(VIT).train()
    torch.nn.init.normal_(network.blocks[-1].attn.qkv.weight, std=0.5)
    was_fused = network.blocks[-1].attn.fused_attn
    found = compute_patch_maps(network, pixels, views, device=CPU)
    assert network.training
    assert network.blocks[-1].attn.fused_attn == was_fused
    network.eval()
    tokens = network._pos_embed(network.patch_embed(normalise_views(torch.from_numpy(pixels), views)))
    first, last = network.blocks
    inputs = last.norm1(first(tokens))
    grid = size_px // 4
    for image in range(3):
        for head in range(3):
            rows = slice(8 * head, 8 * head + 8)
            queries, keys = ((inputs[image] @ part.T)[:, rows] for part in last.attn.qkv.weight.chunk(3)[:2])
            query_bias, key_bias = (part[rows] for part in last.attn.qkv.bias.chunk(3)[:2])
            scores = (queries[0] + query_bias) @ (keys + key_bias).T / 8**0.5
            expected = scores.softmax(dim=0)[1:].reshape(grid, grid).detach().numpy()
            np.testing.assert_allclose(found.attention[image, head], expected, atol=1e-6)
    assert found.components.shape == (3, grid, grid, 3)


def test_components_are_those_of_scikit_learn(generator: np.random.Generator) -> None:
    features = (generator.normal(size=(4, 25, 3)) * [9.0, 5.0, 2.0] @ generator.normal(size=(3, 10))).astype(np.float32)
    found = principal_components(features).reshape(-1, 3)
    expected = PCA(3).fit_transform(features.reshape(-1, 10).astype(np.float64))
    assert (found.min(), found.max()) == (0.0, 1.0)
    for component in range(3):
        inside = (found[:, component] > 0.0) & (found[:, component] < 1.0)
        assert inside.sum() > 90
        correlation = np.corrcoef(found[inside, component], expected[inside, component])[0, 1]
        assert abs(correlation) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_array_equal(principal_components(features), principal_components(features.copy()))


def test_only_transformers_with_a_class_token_and_several_patches_have_maps() -> None:
    assert has_patch_maps(build_backbone(VIT), size_px=8)
    assert not has_patch_maps(build_backbone(VIT), size_px=7)
    assert not has_patch_maps(
        build_backbone(BackboneConfig(name="resnet10", stem="cifar", channels=(4,) * 4)), size_px=8
    )
    assert not has_patch_maps(
        build_backbone(BackboneConfig(name="vit_small_patch16_224", dim=24, num_heads=2, depth=1)), size_px=16
    )


def test_figure_shows_the_images_and_their_colours(tmp_path: Path, generator: np.random.Generator) -> None:
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    pixels[0], pixels[1] = (250, 10, 20), (20, 30, 240)
    components = np.zeros((2, 2, 2, 3), np.float32)
    components[..., 1] = 1.0
    maps = PatchMaps(attention=generator.uniform(0, 0.25, (2, 3, 2, 2)).astype(np.float32), components=components)
    draw_patch_maps(tmp_path / "attention.png", pixels, maps)
    drawn = np.asarray(Image.open(tmp_path / "attention.png").convert("RGB")).reshape(-1, 3)
    for colour in ((250, 10, 20), (20, 30, 240), (0, 255, 0)):
        assert (drawn == colour).all(axis=1).mean() > 0.01, colour
