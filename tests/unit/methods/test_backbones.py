"""Encoders: CIFAR stem, export, and reload into timm by name."""

import dataclasses
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hvp_ray.config import BackboneConfig
from hvp_ray.errors import CheckpointError, ConfigError
from hvp_ray.methods.backbones import (
    build_backbone,
    export_backbone,
    feature_dim,
    forward_tokens,
    load_exported_backbone,
    patch_px,
)
from hvp_ray.methods.initial_weights import load_initial_weights
from tests.helpers import ProgramInAPickle

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


TINY_VIT = BackboneConfig(name="vit_tiny_patch16_224", image_px=16, patch_px=4, dim=24, depth=2, num_heads=2)


@pytest.mark.parametrize("size_px", [8, 12, 16, 32])
def test_vision_transformer_takes_other_sizes_with_interpolated_positions(size_px: int) -> None:
    backbone = build_backbone(TINY_VIT).eval()
    images = torch.randn(2, 3, size_px, size_px)
    tokens = forward_tokens(backbone, images)
    assert tokens.shape == (2, 1 + (size_px // 4) ** 2, 24)
    torch.testing.assert_close(backbone(images), tokens[:, 0])
    embedded = backbone.patch_embed(images)
    of_class, grid = backbone.pos_embed[:, :1], backbone.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(size_px // 4,) * 2, mode="bicubic", antialias=True)
    positions = torch.cat([of_class, resized.flatten(2).transpose(1, 2)], dim=1)
    with_class = torch.cat([backbone.cls_token.expand(2, -1, -1), embedded.reshape(2, -1, 24)], dim=1)
    torch.testing.assert_close(backbone.norm(backbone.blocks(with_class + positions)), tokens)


def test_deit_takes_other_sizes_too() -> None:
    deit = dataclasses.replace(TINY_VIT, name="deit_tiny_patch16_224")
    assert build_backbone(deit).eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 24)


def test_drop_path_is_the_students_and_the_named_sizes_are_timms() -> None:
    student = build_backbone(dataclasses.replace(TINY_VIT, drop_path=0.2))
    teacher = build_backbone(dataclasses.replace(TINY_VIT, drop_path=0.2), drop_path=0.0)
    assert [block.drop_path1.drop_prob for block in student.blocks[1:]] == [pytest.approx(0.2)]
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in teacher.blocks)
    teacher.load_state_dict(student.state_dict())
    for name, dim, depth in (("vit_tiny", 192, 12), ("vit_small", 384, 12), ("vit_base", 768, 12)):
        backbone = build_backbone(BackboneConfig(name=f"{name}_patch16_224"))
        assert (feature_dim(backbone), len(backbone.blocks), patch_px(backbone)) == (dim, depth, 16)


def test_exported_vision_transformer_loads_into_timm(tmp_path: Path) -> None:
    backbone = build_backbone(dataclasses.replace(TINY_VIT, drop_path=0.1)).eval()
    export_backbone(backbone, TINY_VIT, tmp_path / "vit.safetensors")
    (tmp_path / "new").touch()
    assert (tmp_path / "vit.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode, "as any new file"
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_exported_backbone(tmp_path / "vit.safetensors")(images), backbone(images))
    plain = build_backbone(BackboneConfig(name="vit_small_patch16_224"))
    export_backbone(plain, BackboneConfig(name="vit_small_patch16_224"), tmp_path / "small.safetensors")
    timm.create_model("vit_small_patch16_224", num_classes=0).load_state_dict(load_file(tmp_path / "small.safetensors"))


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.bin", "backbone.safetensors"])
def test_pickled_programs_are_never_run(tmp_path: Path, name: str) -> None:
    torch.save({"conv1.weight": ProgramInAPickle(tmp_path / "proof")}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"cannot be read as weights.*nothing but tensors"):
        load_initial_weights(build_backbone(SMALL), str(tmp_path / name))
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors.*Pickled weights .* are not read"):
        load_exported_backbone(tmp_path / name)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("timm_name", "arguments"),
    [
        ("hf-hub:someone/network", "{}"),
        ("local-dir:/tmp", "{}"),
        ("resnet19", "{}"),
        ("resnet18", '{"checkpoint_path": "/tmp/x.pth"}'),
        ("resnet18", '{"pretrained_cfg": {"url": "http://127.0.0.1/x.pth"}}'),
        ("resnet18", '{"pretrained": true}'),
        ("vit_tiny_patch16_224", '{"embed_dim": 3000000000}'),
        ("vit_tiny_patch16_224", '{"embed_dim": 300000, "num_heads": 3}'),
        ("vit_tiny_patch16_224", '{"depth": 100000000}'),
        ("vit_tiny_patch16_224", '{"depth": [3]}'),
        ("vit_tiny_patch16_224", "[" * 100_000),
        ("resnet18", "[1]"),
        ("resnet50", "{}"),
    ],
)
def test_exported_file_may_name_nothing_but_the_network_of_its_tensors(
    tmp_path: Path, timm_name: str, arguments: str
) -> None:
    weights = build_backbone(BackboneConfig(name="resnet18")).state_dict()
    metadata = {"timm_name": timm_name, "timm_arguments": arguments}
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "x", metadata=metadata)
    start = time.process_time()
    with pytest.raises(CheckpointError):
        load_exported_backbone(tmp_path / "x")
    assert time.process_time() - start < 5.0


def test_class_token_starts_as_dinos() -> None:
    """facebookresearch/dino, vision_transformer.py: truncated normal of 0.02; timm starts with 1e-6."""
    backbone = build_backbone(BackboneConfig(name="vit_small_patch16_224"))
    assert float(backbone.cls_token.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert float(backbone.cls_token.detach().abs().max()) < 0.1


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_residual_branches_start_at_zero_only_if_asked(stem: str) -> None:
    for zero in (True, False):
        backbone = build_backbone(BackboneConfig(name="resnet50", stem=stem, zero_init_residual=zero))
        last_norms = [block.bn3.weight for stage in (backbone.layer1, backbone.layer4) for block in stage]
        assert all(bool((weight == (0.0 if zero else 1.0)).all()) for weight in last_norms)


def test_residual_option_is_refused_for_a_network_without_it() -> None:
    with pytest.raises(ConfigError, match="method.backbone.zero_init_residual=False"):
        build_backbone(BackboneConfig(name="vit_tiny_patch16_224", zero_init_residual=False))


def test_file_of_a_cifar_stem_names_the_module_that_timm_needs(tmp_path: Path) -> None:
    for config, needed in ((SMALL, "hvp_ray.methods.backbones"), (BackboneConfig(name="resnet18"), None)):
        export_backbone(build_backbone(config), config, tmp_path / "backbone.safetensors")
        with safe_open(tmp_path / "backbone.safetensors", framework="pt") as file:
            assert file.metadata().get("timm_import") == needed


def test_layer_scale_starts_as_asked_and_weights_replace_it(tmp_path: Path) -> None:
    tiny = BackboneConfig(
        name="vit_small_patch14_reg4_dinov2", image_px=16, patch_px=4, dim=24, depth=2, num_heads=2, layer_scale=0.1
    )
    backbone = build_backbone(tiny)
    scales = [value for name, value in backbone.state_dict().items() if name.endswith(".gamma")]
    assert len(scales) == 4 and all((scale == 0.1).all() for scale in scales)
    assert (build_backbone(dataclasses.replace(tiny, layer_scale=None)).blocks[0].ls1.gamma == 1e-5).all()
    export_backbone(backbone, tiny, tmp_path / "backbone.safetensors")
    again = build_backbone(dataclasses.replace(tiny, layer_scale=0.5))
    load_initial_weights(again, str(tmp_path))
    assert (again.blocks[1].ls2.gamma == 0.1).all()
    assert (load_exported_backbone(tmp_path / "backbone.safetensors").blocks[0].ls2.gamma == 0.1).all()
    with pytest.raises(ConfigError, match="layer_scale=0.1 is not allowed: vit_tiny_patch16_224 has no LayerScale"):
        build_backbone(BackboneConfig(name="vit_tiny_patch16_224", layer_scale=0.1))
