"""Weights to start from: names of timm, torchvision, MoCo, DINO and DINOv2; what does not fit is named."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from hvp_ray.config import BackboneConfig
from hvp_ray.errors import CheckpointError
from hvp_ray.methods.backbones import build_backbone
from hvp_ray.methods.initial_weights import load_initial_weights

RESNET = BackboneConfig(name="resnet18")
VIT = BackboneConfig(name="vit_tiny_patch16_224", depth=2, image_px=32)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def features(backbone: nn.Module) -> Tensor:
    with torch.no_grad():
        return backbone.eval()(IMAGES)


def other(config: BackboneConfig) -> nn.Module:
    torch.manual_seed(1)
    return build_backbone(config)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "lightning": lambda state: {"epoch": 3, "state_dict": prefixed("backbone.", state)},
    "MoCo": lambda state: {"state_dict": prefixed("module.encoder_q.", state) | {"module.queue": torch.zeros(3)}},
    "DINO": lambda state: {
        "student": prefixed("module.backbone.", {name: value + 1 for name, value in state.items()}),
        "teacher": prefixed("backbone.", state) | {"head.mlp.0.weight": torch.zeros(3)},
    },
    "DINOv2": lambda state: {
        "model": prefixed("student.backbone.", {name: value + 1 for name, value in state.items()})
        | prefixed("teacher.backbone.", state)
    },
    "MAE": lambda state: {"model": state | {"decoder_pos_embed": torch.zeros(3)}},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("config", [RESNET, VIT], ids=["resnet", "vit"])
def test_released_files_give_the_features_of_their_network(
    config: BackboneConfig, wrap: Callable[[dict[str, Tensor]], Any], tmp_path: Path
) -> None:
    expected = other(config)
    torch.save(wrap(expected.state_dict()), tmp_path / "weights.pth")
    torch.manual_seed(2)
    backbone = build_backbone(config)
    fit = load_initial_weights(backbone, str(tmp_path / "weights.pth"))
    assert torch.equal(features(backbone), features(expected))
    assert (fit.missing, fit.other_shapes) == ((), ())
    assert fit.num_loaded == fit.num_tensors == len(expected.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_names_of_torchvision_fit_and_its_classifier_is_named(name: str, tmp_path: Path) -> None:
    released = getattr(torchvision.models, name)(weights=None)
    save_file(released.state_dict(), tmp_path / "weights.safetensors")
    backbone = build_backbone(BackboneConfig(name=name))
    fit = load_initial_weights(backbone, str(tmp_path / "weights.safetensors"))
    released.fc = nn.Identity()
    assert torch.allclose(features(backbone), features(released), atol=1e-5)
    assert fit.unused == ("fc.weight", "fc.bias") or fit.unused == ("fc.bias", "fc.weight")
    assert "not used: fc." in fit.describe()


def test_names_and_registers_of_dinov2_fit(tmp_path: Path) -> None:
    """DINOv2 adds the position embedding to the class token too, and names registers in its own way."""
    options = {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
    torch.manual_seed(0)
    expected = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, **options)
    state = expected.state_dict()
    for token in ("reg_token", "cls_token"):
        nn.init.normal_(state[token])
    class_position = torch.randn(1, 1, 48)
    released = {name: value for name, value in state.items() if name not in ("reg_token", "cls_token", "pos_embed")}
    released |= {
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - class_position,
        "pos_embed": torch.cat([class_position, state["pos_embed"]], dim=1),
        "mask_token": torch.zeros(1, 48),
    }
    torch.save(released, tmp_path / "dinov2.pth")
    config = BackboneConfig(name="vit_small_patch14_reg4_dinov2", image_px=28, depth=2, dim=48, num_heads=3)
    backbone = build_backbone(config)
    fit = load_initial_weights(backbone, str(tmp_path / "dinov2.pth"))
    assert fit.num_loaded == fit.num_tensors == len(state)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(backbone.eval()(images), expected.eval()(images), atol=1e-5)


def test_position_embeddings_of_another_size_are_interpolated(tmp_path: Path) -> None:
    large = build_backbone(BackboneConfig(name="vit_tiny_patch16_224", depth=2, image_px=64))
    torch.save(large.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone(VIT)
    fit = load_initial_weights(backbone, str(tmp_path / "weights.pth"))
    assert fit.other_shapes == () and fit.num_loaded == fit.num_tensors
    assert torch.equal(backbone.pos_embed[:, 0], large.pos_embed[:, 0]), "the class token's stays"


def test_what_does_not_fit_is_named_and_keeps_its_weights(tmp_path: Path) -> None:
    released = torchvision.models.resnet18(weights=None).state_dict()
    del released["bn1.bias"]
    torch.save(released, tmp_path / "weights.pth")
    backbone = build_backbone(BackboneConfig(name="resnet18", stem="cifar"))
    before = backbone.state_dict()["conv1.weight"].clone()
    fit = load_initial_weights(backbone, str(tmp_path / "weights.pth"))
    assert fit.missing == ("bn1.bias",)
    assert fit.other_shapes == ("conv1.weight [64, 3, 7, 7], not [64, 3, 3, 3]",)
    assert torch.equal(backbone.state_dict()["conv1.weight"], before)
    assert torch.equal(backbone.state_dict()["layer1.0.conv1.weight"], released["layer1.0.conv1.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(build_backbone(RESNET).state_dict(), tmp_path / "weights.pth")
    for config in (VIT, BackboneConfig(name="resnet10", stem="cifar", channels=(8, 16, 32, 64))):
        with pytest.raises(CheckpointError, match=r"does not fit the backbone: \d+ of \d+ tensors"):
            load_initial_weights(build_backbone(config), str(tmp_path / "weights.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no weights by name"):
        load_initial_weights(build_backbone(VIT), str(tmp_path / "list.pth"))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_weights_of_rgb_are_fitted_to_other_channels(name: str, channels: int, tmp_path: Path) -> None:
    """The first layer keeps the scale of its outputs: on equal channels it gives what it gave on grey images."""
    config = RESNET if name == "resnet18" else VIT
    of_rgb = other(config)
    torch.save(of_rgb.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone(dataclasses.replace(config, in_channels=channels))
    fit = load_initial_weights(backbone, str(tmp_path / "weights.pth"))
    first = "conv1.weight" if config is RESNET else "patch_embed.proj.weight"
    assert [text.split()[0] for text in fit.adapted] == [first] and fit.other_shapes == ()
    assert f"fitted to the channels: {first}" in fit.describe()
    assert torch.equal(backbone.state_dict()[first].sum(1), of_rgb.state_dict()[first].sum(1)) or channels != 1
    if channels == 1:
        grey = IMAGES[:, :1]
        with torch.no_grad():
            torch.testing.assert_close(
                backbone.eval()(grey), of_rgb.eval()(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4
            )
