"""Encoders: CIFAR stem, export, and reload into timm by name."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from hvp_ray.config import BackboneConfig
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.methods.backbones import (
    build_backbone,
    export_backbone,
    feature_dim,
    load_exported_backbone,
    load_initial_weights,
)

SMALL = BackboneConfig(name="resnet18", stem="cifar", channels=(8, 8, 16, 16))


def test_cifar_stem_keeps_the_resolution() -> None:
    backbone = build_backbone(SMALL)
    assert backbone.conv1.stride == (1, 1)
    assert backbone.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)
    assert feature_dim(backbone) == 16


def test_exported_backbone_loads_into_timm_by_name(tmp_path: Path) -> None:
    for config, image_px in ((SMALL, 16), (BackboneConfig(name="resnet18"), 32)):
        backbone = build_backbone(config).eval()
        path = tmp_path / f"{config.stem}.safetensors"
        export_backbone(backbone, config, path)
        images = torch.randn(2, 3, image_px, image_px)
        assert torch.equal(load_exported_backbone(path)(images), backbone(images))
    plain = timm.create_model("resnet18", num_classes=0)
    plain.load_state_dict(load_file(tmp_path / "imagenet.safetensors"))


def test_wrong_names_and_weights_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not known to timm"):
        build_backbone(BackboneConfig(name="resnet19"))
    with pytest.raises(ConfigError, match="channels"):
        build_backbone(BackboneConfig(name="vit_tiny_patch16_224", channels=(1, 2, 3, 4)))
    with pytest.raises(CheckpointError, match="no file"):
        load_initial_weights(build_backbone(SMALL), str(tmp_path))
    export_backbone(build_backbone(BackboneConfig(name="resnet18")), BackboneConfig(name="resnet18"), tmp_path / "x")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_initial_weights(build_backbone(SMALL), str(tmp_path / "x"))
    (tmp_path / "y").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_exported_backbone(tmp_path / "y")
