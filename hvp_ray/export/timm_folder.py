"""timm: weights and config.json, as on the Hugging Face hub."""

import json
import math
from pathlib import Path
from typing import Any

import timm
from torch import nn

from hvp_ray.export import preprocessing
from hvp_ray.export.trained_encoder import WEIGHTS, TrainedEncoder, write_weights
from hvp_ray.methods.backbones import CIFAR_LAYERS, backbone_arguments


def write(encoder: TrainedEncoder, folder: Path) -> None:
    """Write model.safetensors and config.json. Every encoder of a run can be written."""
    backbone, views = encoder.backbone, encoder.views
    known: Any = backbone.pretrained_cfg  # architecture, and names of layers
    size = (encoder.num_channels, encoder.size_px, encoder.size_px)
    config = {
        "architecture": known["architecture"],
        "num_classes": 0,
        "num_features": backbone.num_features,
        "model_args": backbone_arguments(encoder.settings),
        "pretrained_cfg": {
            "input_size": size,
            "fixed_input_size": False,
            "interpolation": views.evaluation_interpolation,
            "crop_pct": crop_fraction(encoder.size_px, views.evaluation_resize_px),
            "crop_mode": "center",
            "mean": views.mean,
            "std": views.std,
            "num_classes": 0,
            "first_conv": known["first_conv"],
            "classifier": known["classifier"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_weights(folder, backbone.state_dict())


def load(_encoder: TrainedEncoder, folder: Path) -> nn.Module:
    """Load a written folder as other programs do. The networks with CIFAR stem are those of `methods.backbones`."""
    network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return network.eval()


def crop_fraction(size_px: int, resize_px: int) -> float:
    """Return the fraction by which timm divides the size of the crop, rounding down, to get the size to resize to."""
    fraction = size_px / resize_px
    return fraction if math.floor(size_px / fraction) == resize_px else math.nextafter(fraction, 0.0)


def describe_loading(encoder: TrainedEncoder, folder_code: str) -> str:
    """Return the section of the model card on loading."""
    imports, transform = preprocessing.imports(encoder), _transform_code(encoder)
    transform += "with torch.no_grad():\n    features = encoder(images)\n"
    if not preprocessing.is_pillow_image(encoder):
        imports += "\nfrom torchvision.transforms import v2"
    if encoder.settings.stem == "imagenet":
        return f"""\
```python
import timm
import torch
{imports}

{folder_code}
encoder = timm.create_model(f"local-dir:{{folder}}", pretrained=True).eval()
{transform}```

`num_classes=10` adds a new classifier.
"""
    return f"""\
timm has no ResNet with a CIFAR stem (a first convolution of 3x3 and no pooling) by name. It is built like this:

```python
import timm
import torch
{imports}
from safetensors.torch import load_file

{folder_code}
encoder = {_cifar_code(encoder)}
encoder.conv1 = torch.nn.Conv2d({encoder.num_channels}, encoder.conv1.out_channels, kernel_size=3, padding=1, bias=False)
encoder.maxpool = torch.nn.Identity()
encoder.load_state_dict(load_file(f"{{folder}}/{WEIGHTS}"))
encoder.eval()
{transform}```

If hvp_ray is installed, `import hvp_ray.methods.backbones` makes timm know the network, and
`timm.create_model(f"local-dir:{{folder}}", pretrained=True)` loads it.
"""


def _transform_code(encoder: TrainedEncoder) -> str:
    """Return statements that turn the file into `images`; timm's transforms take what Pillow opens."""
    if not preprocessing.is_pillow_image(encoder):
        return preprocessing.torchvision_code(encoder)
    views = encoder.views
    return f"""\
transform = timm.data.create_transform(
    input_size={encoder.size_px},
    interpolation="{views.evaluation_interpolation}",
    crop_pct={crop_fraction(encoder.size_px, views.evaluation_resize_px)},
    mean={views.mean},
    std={views.std},
)
images = transform({preprocessing.open_code(encoder)}).unsqueeze(0)
"""


def _cifar_code(encoder: TrainedEncoder) -> str:
    settings = encoder.settings
    name, layers = settings.name, ""
    if not timm.is_model(name):
        name, layers = "resnet18", f", layers={CIFAR_LAYERS[settings.name]}"
    channels = "" if settings.channels is None else f", channels={settings.channels}"
    if encoder.num_channels != 3:
        channels += f", in_chans={encoder.num_channels}"
    return f'timm.create_model("{name}", num_classes=0{layers}{channels})'
