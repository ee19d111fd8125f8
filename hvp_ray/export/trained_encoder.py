"""The encoder of a run, with the settings that a format needs."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hvp_ray.config import BackboneConfig, ViewsConfig
from hvp_ray.data.intensity import IntensityRange

WEIGHTS = "model.safetensors"
"""Name of the weights in a written folder, as timm, transformers and the Hugging Face hub expect it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainedEncoder:
    """The encoder of a run."""

    backbone: nn.Module
    """In evaluation mode, on the CPU."""
    settings: BackboneConfig
    views: ViewsConfig
    intensity_range: IntensityRange | None = None
    """Black and white of the run's images, if they have more than 8 bits per channel."""

    @property
    def size_px(self) -> int:
        """Height and width of the images that the run evaluates on."""
        return self.views.global_views.size_px

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return len(self.views.mean)

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Return the features of normalised images."""
        features: Tensor = self.backbone(images)
        return features

    def at_one_size(self) -> nn.Module:
        """Return a copy of the network for images of `size_px`: a Vision Transformer's position embeddings fit them.

        timm's network interpolates them at every call instead, to the same values.
        """
        network = copy.deepcopy(self.backbone)
        if isinstance(network, VisionTransformer):
            network.set_input_size(img_size=(self.size_px, self.size_px))
        return network


def write_weights(folder: Path, state: dict[str, Tensor]) -> None:
    """Write model.safetensors, readable by whoever may read new files; safetensors' own `save_file` lets only you read it."""
    tensors = {name: value.contiguous() for name, value in state.items()}
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
