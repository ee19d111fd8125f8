"""transformers: a Vision Transformer as `ViTModel`, with config.json and preprocessor_config.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hvp_ray.errors import ConfigError
from hvp_ray.export import preprocessing
from hvp_ray.export.trained_encoder import TrainedEncoder, write_weights
from hvp_ray.extras import require_extra

_OF_THE_MODEL = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_OF_A_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""timm's names -> the names of files for `ViTModel`, which transformers 5 renames while reading and writing."""


def write(encoder: TrainedEncoder, folder: Path) -> None:
    """Write model.safetensors, config.json and, for three channels, preprocessor_config.json.

    `ViTModel` takes images of one size, so position embeddings are resampled to the size of the run's evaluation.

    Raises:
        ConfigError: the network is no `ViTModel`.
    """
    transformers = _transformers()
    network = _checked(encoder.at_one_size(), encoder.settings.name)
    config = transformers.ViTConfig(
        architectures=["ViTModel"],
        dtype="float32",
        hidden_size=network.embed_dim,
        num_hidden_layers=len(network.blocks),
        num_attention_heads=network.blocks[0].attn.num_heads,
        intermediate_size=network.blocks[0].mlp.fc1.out_features,
        hidden_act="gelu",
        layer_norm_eps=network.norm.eps,
        image_size=encoder.size_px,
        patch_size=network.patch_embed.patch_size[0],
        num_channels=encoder.num_channels,
        qkv_bias=network.blocks[0].attn.qkv.bias is not None,
    )
    config.save_pretrained(folder)
    views = encoder.views
    if encoder.num_channels != 3:  # the processor takes what Pillow opens as RGB
        write_weights(folder, _renamed(network.state_dict(), encoder.settings.name))
        return
    transformers.BitImageProcessor(  # like ViTImageProcessor, but it crops the centre, as the run's evaluation does
        size={"shortest_edge": views.evaluation_resize_px},
        crop_size={"height": encoder.size_px, "width": encoder.size_px},
        resample={"bilinear": 2, "bicubic": 3}[views.evaluation_interpolation],
        image_mean=list(views.mean),
        image_std=list(views.std),
    ).save_pretrained(folder)
    write_weights(folder, _renamed(network.state_dict(), encoder.settings.name))


def load(_encoder: TrainedEncoder, folder: Path) -> Callable[[Tensor], Tensor]:
    """Load a written folder as the model card says."""
    transformers = _transformers()
    bars_were_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        network = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    finally:
        if bars_were_on:
            transformers.utils.logging.enable_progress_bar()

    def embed(images: Tensor) -> Tensor:
        features: Tensor = network(pixel_values=images).last_hidden_state[:, 0]
        return features

    return embed


def describe_loading(encoder: TrainedEncoder, folder_code: str) -> str:
    """Return the section of the model card on loading."""
    imports, prepare, inputs = _input_code(encoder)
    return f"""\
The features are the class token after the final norm. The pooler of `ViTModel` is off, because the encoder has none.
`last_hidden_state[:, 1:]` are the patches.

```python
import torch
{imports}

{folder_code}
encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
{prepare}with torch.no_grad():
    features = encoder({inputs}).last_hidden_state[:, 0]
```
"""


def _input_code(encoder: TrainedEncoder) -> tuple[str, str, str]:
    """Return imports, statements that prepare the file, and the argument of the encoder."""
    opened, imports = preprocessing.open_code(encoder), preprocessing.imports(encoder)
    if encoder.num_channels != 3 or not preprocessing.is_pillow_image(encoder):
        imports += "\nfrom torchvision.transforms import v2\nfrom transformers import AutoModel"
        return imports, preprocessing.torchvision_code(encoder), "pixel_values=images"
    prepare = f"""\
processor = AutoImageProcessor.from_pretrained(folder)
inputs = processor(images={opened}, return_tensors="pt")
"""
    return f"{imports}\nfrom transformers import AutoImageProcessor, AutoModel", prepare, "**inputs"


def _transformers() -> Any:
    return require_extra("transformers", extra="export", purpose="--to transformers")


def _checked(network: nn.Module, name: str) -> VisionTransformer:
    """Return the network after checking what the names of its weights do not show; `_renamed` checks the rest."""
    if not isinstance(network, VisionTransformer):
        raise _refused(name, "it is no Vision Transformer of timm's")
    if network.global_pool != "token" or not network.has_class_token or network.no_embed_class:
        raise _refused(
            name, f"its features are not a class token with a position embedding (pooling {network.global_pool!r})"
        )
    activation = network.blocks[0].mlp.act
    if not isinstance(activation, nn.GELU) or activation.approximate != "none":
        raise _refused(name, f"its activation is {activation}")
    return network


def _renamed(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights under the names of files for `ViTModel`."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        block, number, part = "", "", stem
        if key.startswith("blocks."):
            block, number, part = stem.split(".", 2)
        prefix = f"encoder.layer.{number}."
        if block and part == "attn.qkv":
            for target, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{prefix}attention.attention.{target}.{kind}"] = third
        elif block and part in _OF_A_BLOCK:
            renamed[f"{prefix}{_OF_A_BLOCK[part]}.{kind}"] = value
        elif not block and key in _OF_THE_MODEL:
            renamed[_OF_THE_MODEL[key]] = value
        elif not block and stem in _OF_THE_MODEL:
            renamed[f"{_OF_THE_MODEL[stem]}.{kind}"] = value
        else:
            raise _refused(name, f"ViTModel has no place for {key}")
    return renamed


def _refused(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"--to transformers is not allowed: {name} cannot become a ViTModel, because {reason}. Use --to timm or --to onnx"
    )
