"""Folders of finished runs with encoders that were not trained, and the code blocks of their model cards."""

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hvp_ray.config import BackboneConfig, DataConfig, RunConfig, ViewsConfig, config_to_dict
from hvp_ray.data.intensity import IntensityRange
from hvp_ray.methods.backbones import build_backbone, export_backbone
from tests.helpers import encode, photograph_like, tiny_config, views_config

RESIZE_PX = 20
NETWORKS = {
    "resnet50": BackboneConfig(name="resnet50", zero_init_residual=False),
    "narrow": BackboneConfig(name="resnet18", channels=(8, 16, 24, 32)),
    "cifar": BackboneConfig(name="resnet18", stem="cifar"),
    "cifar-narrow": BackboneConfig(name="resnet10", stem="cifar", channels=(8, 8, 16, 16)),
    "cifar-10": BackboneConfig(name="resnet10", stem="cifar"),
    "vit": BackboneConfig(name="vit_tiny_patch16_224", image_px=16, patch_px=4, dim=48, depth=2, num_heads=3),
    "vit-other-size": BackboneConfig(
        name="deit_tiny_patch16_224", image_px=32, patch_px=4, dim=24, depth=2, num_heads=2
    ),
}


def views(channels: int = 3) -> ViewsConfig:
    """Evaluate on the central 16 of 20 pixels, which are not resized if an image has 20."""
    return dataclasses.replace(
        views_config(16),
        evaluation_resize_px=RESIZE_PX,
        evaluation_interpolation="bicubic",
        mean=(0.4, 0.5, 0.6, 0.3, 0.2)[:channels],
        std=(0.2, 0.3, 0.25, 0.2, 0.3)[:channels],
    )


def image_of(generator: np.random.Generator, height: int, width: int, channels: int) -> tuple[str, bytes]:
    """Return an ending and a file: a PNG of one or three channels, or an array."""
    if channels in (1, 3):
        pixels = photograph_like(generator, height, width)
        return ".png", encode(pixels if channels == 3 else pixels[..., 0])
    buffer = io.BytesIO()
    np.save(buffer, generator.integers(0, 256, (height, width, channels), np.uint8))
    return ".npy", buffer.getvalue()


def make_run(
    folder: Path, backbone: BackboneConfig, *, channels: int = 3, intensity_range: IntensityRange | None = None
) -> tuple[Path, nn.Module]:
    """Write a run on a folder of images; return its folder and its encoder, whose weights and statistics are random."""
    generator = np.random.default_rng(0)
    data = folder / "photographs"
    for index in range(6):
        ending, content = image_of(generator, RESIZE_PX, RESIZE_PX, channels)
        path = data / "abc"[index % 3] / f"{index}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    config = tiny_config(str(folder), run={"name": "my-run"})
    config = dataclasses.replace(
        config,
        data=DataConfig(source=str(data), test_fraction=0.5, channels=channels, intensity_range=intensity_range),
        views=views(channels),
        method=dataclasses.replace(config.method, backbone=backbone),
    )
    backbone = config.encoder
    encoder = build_backbone(backbone).eval()
    for name, value in encoder.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.is_floating_point() and value.ndim == 1:
            value.add_(torch.randn(value.shape) * 0.2)
    run_dir = folder / "my-run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps({"config": config_to_dict(config), "identity": {}}))
    (run_dir / "summary.json").write_text(json.dumps(summary_of(config)))
    export_backbone(encoder, backbone, run_dir / "backbone.safetensors")
    return run_dir, encoder


def summary_of(config: RunConfig) -> dict[str, Any]:
    return {
        "run_name": config.run.name,
        "num_training_images": 3,
        "num_epochs": 2.0,
        "num_steps": 7,
        "knn_top1": 0.87654,
        "knn_top1_untrained": 0.5,
        "num_knn_training_images": 5000,
        "loss_last": -0.25,
        "other_iou_mean": None,
    }


def run_code_of_card(folder: Path) -> dict[str, Any]:
    """Execute the Python code of README.md; return its names. The working folder must be `folder`, as the card says."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names
