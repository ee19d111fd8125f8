"""torchvision: weights of a ResNet under the names of its state dict, which are timm's."""

from pathlib import Path

import torchvision  # type: ignore[import-untyped]
from safetensors.torch import load_file
from torch import nn

from hvp_ray.errors import ConfigError
from hvp_ray.export import preprocessing
from hvp_ray.export.trained_encoder import WEIGHTS, TrainedEncoder, write_weights
from hvp_ray.methods.backbones import CIFAR_LAYERS

_NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
"""Networks that timm and torchvision build equally, under one name."""


def write(encoder: TrainedEncoder, folder: Path) -> None:
    """Write model.safetensors, without a classifier.

    Raises:
        ConfigError: torchvision has no such network.
    """
    name, channels = encoder.settings.name, encoder.settings.channels
    if name not in (*_NETWORKS, "resnet10"):
        raise ConfigError(
            f"--to torchvision is not allowed: torchvision has no network with the weights of {name}; expected one of "
            f"{', '.join(_NETWORKS)}. Use --to timm or --to onnx"
        )
    if channels not in (None, (64, 128, 256, 512)):
        raise ConfigError(
            f"--to torchvision is not allowed: torchvision has no {name} with stages of {channels} channels. Use --to timm "
            f"or --to onnx"
        )
    write_weights(folder, encoder.backbone.state_dict())


def load(encoder: TrainedEncoder, folder: Path) -> nn.Module:
    """Load written weights as the model card says."""
    name = encoder.settings.name
    network: nn.Module
    if name == "resnet10":
        network = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, list(CIFAR_LAYERS[name]))
    else:
        network = torchvision.models.get_model(name)
    network.fc = nn.Identity()
    if encoder.settings.stem == "cifar":
        network.conv1 = nn.Conv2d(encoder.num_channels, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif encoder.num_channels != 3:
        network.conv1 = nn.Conv2d(encoder.num_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    network.load_state_dict(load_file(folder / WEIGHTS))
    return network.eval()


def describe_loading(encoder: TrainedEncoder, folder_code: str) -> str:
    """Return the section of the model card on loading."""
    name = encoder.settings.name
    network = f"torchvision.models.{name}()"
    if name == "resnet10":
        network = f"torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, {list(CIFAR_LAYERS[name])})"
    stem, about_stem = "", ""
    if encoder.settings.stem == "cifar":
        stem = f"""\
encoder.conv1 = torch.nn.Conv2d({encoder.num_channels}, 64, kernel_size=3, padding=1, bias=False)
encoder.maxpool = torch.nn.Identity()
"""
        about_stem = " Its first convolution is one of 3x3, without pooling, for small images (CIFAR stem)."
    elif encoder.num_channels != 3:
        stem = f"""\
encoder.conv1 = torch.nn.Conv2d({encoder.num_channels}, 64, kernel_size=7, stride=2, padding=3, bias=False)
"""
        about_stem = f" Its first convolution takes {encoder.num_channels} channel(s)."
    return f"""\
The file has the names of `torchvision.models`, without the classifier `fc`. Assign a new `fc` after loading to train a
classifier.{about_stem}

```python
import torch
import torchvision
{preprocessing.imports(encoder)}
from safetensors.torch import load_file
from torchvision.transforms import v2

{folder_code}
encoder = {network}
encoder.fc = torch.nn.Identity()
{stem}encoder.load_state_dict(load_file(f"{{folder}}/{WEIGHTS}"))
encoder.eval()
{preprocessing.torchvision_code(encoder)}with torch.no_grad():
    features = encoder(images)
```
"""
