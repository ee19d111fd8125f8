"""Projection heads: widths and numbers of weights against the sources."""

import torch
from torch import nn

from hvp_ray.methods.method import build_method
from hvp_ray.methods.simsiam import SimSiam
from hvp_ray.recipes import get_recipe


def _projector(recipe: str) -> nn.Module:
    with torch.device("meta"):
        method = build_method(get_recipe(recipe).method)
    assert isinstance(method, SimSiam)
    return method.projector


def _widths(head: nn.Module) -> list[tuple[int, int]]:
    return [(layer.in_features, layer.out_features) for layer in head.modules() if isinstance(layer, nn.Linear)]


def test_hidden_layers_of_the_simsiam_projector_are_as_wide_as_the_encoder() -> None:
    """facebookresearch/simsiam, builder.py: `nn.Linear(prev_dim, prev_dim)` for all layers but the last."""
    assert _widths(_projector("simsiam-cifar10")) == [(512, 512), (512, 2048)]
    assert _widths(_projector("simsiam-imagenet-r50-100ep")) == [(2048, 2048)] * 3


def test_simsiam_cifar10_has_the_number_of_weights_of_the_authors() -> None:
    weights = [layer.weight for layer in _projector("simsiam-cifar10").modules() if isinstance(layer, nn.Linear)]
    assert sum(weight.numel() for weight in weights) == 512 * 512 + 512 * 2048 == 1_310_720


def test_small_recipes_keep_the_widths_that_their_results_were_measured_with() -> None:
    assert _widths(_projector("simsiam-digits")) == [(128, 128), (128, 128)]
    assert _widths(_projector("simsiam-cifar10-small")) == [(128, 512), (512, 512)]
