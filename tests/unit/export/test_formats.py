"""Written encoders load in their libraries by the code of their model cards, and give the features of the run's encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from transformers import AutoModel

from hvp_ray.cli.export import main
from hvp_ray.config import BackboneConfig, DataConfig
from hvp_ray.data.source import open_source
from hvp_ray.evaluation.features import extract_features, load_evaluation_pixels
from hvp_ray.export.timm_folder import crop_fraction
from tests.unit.data.made_intensities import png16
from tests.unit.export.runs import NETWORKS, RESIZE_PX, image_of, make_run, run_code_of_card, views

CPU = torch.device("cpu")


def _export(tmp_path: Path, backbone: BackboneConfig, to: str, *, channels: int = 3) -> tuple[Path, nn.Module]:
    run_dir, encoder = make_run(tmp_path, backbone, channels=channels)
    assert main([str(run_dir), "--to", to]) == 0
    return run_dir / "export" / to, encoder


def _features_of(library: str, names: dict[str, Any], images: torch.Tensor) -> torch.Tensor:
    encoder = names["encoder"]
    with torch.no_grad():
        match library:
            case "transformers":
                return encoder(pixel_values=images).last_hidden_state[:, 0]
            case "onnx":
                return torch.from_numpy(encoder.run(None, {"images": images.numpy()})[0])
            case _:
                return encoder(images)


@pytest.mark.parametrize(
    ("to", "network", "channels"),
    [
        *(("timm", network, 3) for network in ("narrow", "cifar", "cifar-narrow", "vit", "vit-other-size")),
        *(("torchvision", network, 3) for network in ("resnet50", "cifar", "cifar-10")),
        *(("transformers", network, 3) for network in ("vit", "vit-other-size")),
        *(pytest.param("onnx", network, 3, marks=pytest.mark.slow) for network in ("narrow", "vit-other-size")),
        *(("timm", network, channels) for network in ("narrow", "cifar-narrow", "vit") for channels in (1, 5)),
        *(("torchvision", network, channels) for network in ("resnet50", "cifar-10") for channels in (1, 5)),
        *(("transformers", "vit", channels) for channels in (1, 5)),
        *(pytest.param("onnx", "narrow", channels, marks=pytest.mark.slow) for channels in (1, 5)),
    ],
)
def test_code_of_the_card_gives_the_features_of_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    generator: np.random.Generator,
    to: str,
    network: str,
    channels: int,
) -> None:
    folder, encoder = _export(tmp_path, NETWORKS[network], to, channels=channels)
    assert "On 3 images of the run's data" in capsys.readouterr().out
    ending, content = image_of(generator, RESIZE_PX + 8, RESIZE_PX, channels)
    photograph = folder / f"image{ending}"
    photograph.write_bytes(content)
    monkeypatch.chdir(folder)
    names = run_code_of_card(folder)
    tolerance = 1e-4 if to == "onnx" else 1e-5
    for batch in (1, 5):  # 2 images were given to ONNX's exporter, 3 to the comparison
        images = torch.from_numpy(generator.normal(size=(batch, channels, 16, 16)).astype(np.float32))
        with torch.no_grad():
            expected = encoder(images)
        assert float(expected.std()) > 0.01
        torch.testing.assert_close(_features_of(to, names, images), expected, rtol=tolerance, atol=tolerance)
    (tmp_path / "one").mkdir()
    photograph.rename(tmp_path / "one" / photograph.name)
    data = DataConfig(source=str(tmp_path / "one"), channels=channels)
    pixels, _ = load_evaluation_pixels(open_source(data.source, data), np.zeros(1, np.int64), views(channels), data)
    expected = extract_features(encoder, pixels, views(channels), device=CPU)
    found = torch.as_tensor(names["features"])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("to", "network", "channels"),
    [
        *(("timm", "narrow", channels) for channels in (1, 3)),
        ("torchvision", "cifar-10", 1),
        *(("transformers", "vit", channels) for channels in (1, 3)),
        pytest.param("onnx", "narrow", 1, marks=pytest.mark.slow),
    ],
)
def test_code_of_the_card_scales_images_of_more_than_8_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generator: np.random.Generator,
    to: str,
    network: str,
    channels: int,
) -> None:
    black_white = (200.0, 3900.0)
    run_dir, encoder = make_run(tmp_path, NETWORKS[network], channels=channels, intensity_range=black_white)
    assert main([str(run_dir), "--to", to]) == 0
    values = generator.integers(0, 4096, (RESIZE_PX + 8, RESIZE_PX, channels), np.uint16)
    monkeypatch.chdir(run_dir / "export" / to)
    np.save("image.npy", values)
    names = run_code_of_card(Path())
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(png16(values if channels == 3 else values[..., 0]))
    data = DataConfig(source=str(tmp_path / "one"), channels=channels, intensity_range=black_white)
    pixels, _ = load_evaluation_pixels(open_source(data.source, data), np.zeros(1, np.int64), views(channels), data)
    expected = extract_features(encoder, pixels, views(channels), device=CPU)
    torch.testing.assert_close(torch.as_tensor(names["features"]), expected, rtol=1e-4, atol=1e-4)


def test_timm_folder_takes_a_classifier_and_keeps_the_preprocessing(tmp_path: Path) -> None:
    folder, encoder = _export(tmp_path, NETWORKS["vit-other-size"], "timm")
    classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert classifier(images).shape == (2, 7)
        torch.testing.assert_close(
            classifier.forward_head(classifier.forward_features(images), pre_logits=True), encoder(images)
        )
    config = timm.data.resolve_model_data_config(classifier)
    assert config["input_size"] == [3, 16, 16]
    assert (config["interpolation"], config["mean"]) == ("bicubic", list(views().mean))
    by_checkpoint = timm.create_model(
        "deit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=2,
        dynamic_img_size=True, checkpoint_path=folder / "model.safetensors",
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(by_checkpoint.eval()(images), encoder(images))


def test_timm_loads_a_cifar_stem_by_name_if_hvp_ray_is_imported(tmp_path: Path) -> None:
    folder, encoder = _export(tmp_path, NETWORKS["cifar-narrow"], "timm")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), encoder(images))


def test_timm_resizes_to_the_size_of_the_evaluation() -> None:
    for size_px in range(4, 225, 11):
        for resize_px in range(size_px, 2 * size_px + 100, 3):
            transform = timm.data.create_transform(input_size=size_px, crop_pct=crop_fraction(size_px, resize_px))
            assert transform.transforms[0].size == resize_px


def test_transformers_gives_the_patches_too(tmp_path: Path) -> None:
    folder, encoder = _export(tmp_path, NETWORKS["vit-other-size"], "transformers")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = AutoModel.from_pretrained(folder, add_pooling_layer=False)(pixel_values=images).last_hidden_state
        torch.testing.assert_close(found, encoder.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("to", "backbone", "reason"),
    [
        ("torchvision", NETWORKS["narrow"], "no resnet18 with stages of (8, 16, 24, 32) channels"),
        ("torchvision", NETWORKS["vit"], "no network with the weights of vit_tiny_patch16_224"),
        ("transformers", NETWORKS["cifar-narrow"], "it is no Vision Transformer"),
        (
            "transformers",
            BackboneConfig(name="vit_base_patch14_dinov2", image_px=16, patch_px=4, dim=24, depth=1, num_heads=2),
            "no place for blocks.0.ls1.gamma",
        ),
        (
            "transformers",
            BackboneConfig(name="vit_base_patch16_gap_224", image_px=16, patch_px=4, dim=24, depth=1, num_heads=2),
            "not a class token",
        ),
    ],
)
def test_network_that_a_library_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, backbone: BackboneConfig, reason: str
) -> None:
    run_dir, _ = make_run(tmp_path, backbone)
    assert main([str(run_dir), "--to", to]) == 1
    error = capsys.readouterr().err
    assert f"--to {to} is not allowed" in error
    assert reason in error
    assert "Use --to timm or --to onnx" in error
    assert list((run_dir / "export").iterdir()) == []
    assert main([str(run_dir), "--to", "timm"]) == 0
