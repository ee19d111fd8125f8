"""The optimizers: LARS in both forms against the formulas, in float64; rates of layers; fused kernels."""

from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from hvp_ray.config import BackboneConfig, OptimizerConfig
from hvp_ray.errors import ConfigError
from hvp_ray.methods.configs import SimSiamConfig
from hvp_ray.methods.method import Method, build_method
from hvp_ray.recipes import get_recipe
from hvp_ray.training.optimizers import build_optimizer, set_schedule

Norm = Literal["decayed-gradient", "separate"]


class _Weights(Method):
    """A matrix, a vector and a matrix of zeros, all trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))
        self.zeros = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))


def _config(norm: Norm) -> OptimizerConfig:
    return OptimizerConfig(
        name="lars", learning_rate_per_256=0.3, weight_decay=0.1, decay_exempts_vectors=True, lars_norm=norm
    )


def _slow_lars(
    weights: NDArray[np.float64], gradients: list[NDArray[np.float64]], config: OptimizerConfig, rates: list[float]
) -> NDArray[np.float64]:
    """LARS of one tensor: local rate, momentum, update."""
    moved, velocity = weights.copy(), np.zeros_like(weights)
    for gradient, rate in zip(gradients, rates, strict=True):
        update, local_rate = gradient, 1.0
        if weights.ndim > 1:
            update = gradient + config.weight_decay * moved
            size = np.linalg.norm(moved)
            if config.lars_norm == "decayed-gradient":
                divisor = np.linalg.norm(update)
            else:
                divisor = np.linalg.norm(gradient) + config.weight_decay * size
            if size > 0 and divisor > 0:
                local_rate = config.lars_trust_coefficient * size / divisor
        velocity = config.momentum * velocity + local_rate * update
        moved = moved - rate * velocity
    return moved


@pytest.mark.parametrize("norm", ["decayed-gradient", "separate"])
def test_lars_is_its_formula(generator: np.random.Generator, norm: Norm) -> None:
    config, method = _config(norm), _Weights()
    start = {name: p.detach().numpy().copy() for name, p in method.named_parameters()}
    gradients = {name: [generator.normal(size=value.shape) for _ in range(6)] for name, value in start.items()}
    rates = [0.0, 0.1, 0.3, 0.3, 0.2, 0.1]
    optimizer = build_optimizer(method, config, images_per_step=256)
    for step, rate in enumerate(rates):
        set_schedule(optimizer, learning_rate=rate, weight_decay=config.weight_decay)
        for name, parameter in method.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name][step].copy())
        optimizer.step()
    for name, parameter in method.named_parameters():
        expected = _slow_lars(start[name], gradients[name], config, rates)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-7)  # timm's form adds 1e-8 to the norm
        assert not np.allclose(parameter.detach().numpy(), start[name])


def test_forms_differ_where_decay_points_along_the_gradient(generator: np.random.Generator) -> None:
    moved = {}
    for norm in ("decayed-gradient", "separate"):
        method = _Weights()
        optimizer = build_optimizer(method, _config(norm), images_per_step=256)
        for parameter in method.parameters():
            parameter.grad = -parameter.detach()  # decay shortens the step: |g + wd w| = |g| - wd |w|
        before = method.matrix.detach().clone()
        optimizer.step()
        moved[norm] = float((method.matrix.detach() - before).norm())
    assert moved["separate"] / moved["decayed-gradient"] == pytest.approx(0.9 / 1.1, rel=1e-6)


def test_lars_continues_from_its_state(generator: np.random.Generator) -> None:
    """The decay is back in the groups after a step, so that a checkpoint's settings are those of the run."""
    straight, resumed = _Weights(), _Weights()
    gradients = [[torch.from_numpy(generator.normal(size=p.shape)) for p in straight.parameters()] for _ in range(4)]

    def train(method: Method, optimizer: torch.optim.Optimizer, steps: list[int]) -> None:
        for step in steps:
            for parameter, gradient in zip(method.parameters(), gradients[step], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    config = _config("decayed-gradient")
    optimizer = build_optimizer(straight, config, images_per_step=256)
    train(straight, optimizer, [0, 1, 2, 3])
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, config.weight_decay]
    first = build_optimizer(resumed, config, images_per_step=256)
    train(resumed, first, [0, 1])
    second = build_optimizer(resumed, config, images_per_step=256)
    second.load_state_dict(first.state_dict())
    train(resumed, second, [2, 3])
    for ours, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_recipes_have_the_form_of_their_source() -> None:
    """The HVP authors' LARS divides by the norm of the decayed gradient, solo-learn's by the sum of two norms."""
    assert get_recipe("simclr-imagenet-r50-100ep").optimizer.lars_norm == "decayed-gradient"
    assert get_recipe("simclr-cifar10").optimizer.lars_norm == "separate"


@pytest.mark.parametrize("name", ["resnet10", "vit_tiny_patch16_224"])
def test_layers_of_the_encoder_have_rates_that_fall_towards_its_input(name: str) -> None:
    """The rate of a layer is layer_decay ** (layers above it); heads and the last layer have the full rate."""
    sizes = {"image_px": 32, "depth": 3} if name.startswith("vit") else {"stem": "cifar"}
    method = build_method(SimSiamConfig(backbone=BackboneConfig(name=name, **sizes)))
    config = OptimizerConfig(name="adamw", learning_rate_per_256=0.1, layer_decay=0.5, constant_predictor_rate=False)
    optimizer = build_optimizer(method, config, images_per_step=256)
    set_schedule(optimizer, learning_rate=0.08, weight_decay=0.0)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate_of) == len([p for p in method.parameters() if p.requires_grad])
    rates = {name: rate_of[id(p)] for name, p in method.backbone.named_parameters()}
    if name.startswith("vit"):
        blocks = [rates[f"blocks.{block}.attn.qkv.weight"] for block in range(3)]
        assert blocks == pytest.approx([0.08 * 0.5**2, 0.08 * 0.5, 0.08]), "the final norm is in the last layer"
        assert rates["patch_embed.proj.weight"] == rates["pos_embed"] == pytest.approx(0.08 * 0.5**3)
        assert rates["norm.weight"] == pytest.approx(0.08)
    else:
        ordered = [rates["conv1.weight"], *(rates[f"layer{layer}.0.conv1.weight"] for layer in (1, 2, 3, 4))]
        assert ordered == sorted(ordered) and ordered[0] < ordered[-1] <= 0.08
    assert {rate_of[id(p)] for p in method.predictor.parameters()} == {0.08}


def test_patch_embedding_has_a_factor_of_its_own_beside_the_layers() -> None:
    backbone = BackboneConfig(name="vit_tiny_patch16_224", image_px=32, depth=3)
    method = build_method(SimSiamConfig(backbone=backbone))
    config = OptimizerConfig(name="adamw", learning_rate_per_256=0.1, layer_decay=0.5, patch_embedding_rate=0.2)
    optimizer = build_optimizer(method, config, images_per_step=256)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate_of[id(p)] for name, p in method.backbone.named_parameters()}
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert rates[name] == pytest.approx(0.2 * 0.1 * 0.5**3)
    assert rates["pos_embed"] == pytest.approx(0.1 * 0.5**3)
    resnet = build_method(SimSiamConfig(backbone=BackboneConfig(name="resnet10", stem="cifar")))
    with pytest.raises(ConfigError, match=r"optimizer.patch_embedding_rate=0.2 .* no Vision Transformer"):
        build_optimizer(resnet, config, images_per_step=256)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_kernels_make_the_same_update(name: Literal["sgd", "adamw"]) -> None:
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        method = build_method(SimSiamConfig(backbone=BackboneConfig(name="resnet10", stem="cifar")))
        config = OptimizerConfig(name=name, learning_rate_per_256=0.1, fused=fused)
        optimizer = build_optimizer(method, config, images_per_step=256)
        assert all(group["fused"] is (True if fused else None) for group in optimizer.param_groups)
        for step in range(3):
            for parameter in method.parameters():
                parameter.grad = torch.sin(parameter.detach() + step)
            optimizer.step()
        weights.append([parameter.detach() for parameter in method.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="optimizer.fused=True is not allowed: False with optimizer.name=lars"):
        OptimizerConfig(name="lars", learning_rate_per_256=0.1, fused=True)


def test_layer_decay_of_1_has_the_groups_of_before() -> None:
    method = build_method(SimSiamConfig(backbone=BackboneConfig(name="resnet10", stem="cifar")))
    optimizer = build_optimizer(method, OptimizerConfig(learning_rate_per_256=0.1), images_per_step=256)
    assert [group["rate_scale"] for group in optimizer.param_groups] == [1.0] * len(optimizer.param_groups)
    assert len(optimizer.param_groups) == 2
