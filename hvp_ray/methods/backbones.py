"""Encoders from timm: ResNets, with a CIFAR stem for small images, and Vision Transformers.

`build_backbone` gives a module [B, C, H, W] -> [B, D] of pooled features (the class token of a Vision Transformer,
which takes views of any size that its patches divide: its position embeddings are interpolated). Importing this module
registers the CIFAR variants with timm by name (`hvp_ray_resnet18_cifar`, ...), so that `timm.create_model(name)` builds
them. docs/export.md: how other programs load an encoder.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, is_model_in_modules, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import Tensor, nn

from hvp_ray.config import BackboneConfig
from hvp_ray.errors import CheckpointError, ConfigError, first_line

_CIFAR_NAME = "hvp_ray_{name}_cifar"


def build_backbone(config: BackboneConfig, *, drop_path: float | None = None) -> nn.Module:
    """Build the encoder without a classifier.

    Args:
        config: the encoder to build.
        drop_path: stochastic depth; None: that of `config`. A teacher is built with 0.

    Raises:
        ConfigError: timm does not know the name, or an option does not fit the network.
    """
    name = config.name if config.stem == "imagenet" else _CIFAR_NAME.format(name=config.name)
    if not timm.is_model(name):
        raise ConfigError(
            f"method.backbone.name={config.name!r} with stem={config.stem!r} is not known to timm {timm.__version__}; "
            f"see timm.list_models() (CIFAR stem: {', '.join(_CIFAR_RESNETS)})"
        )
    if config.stem == "cifar" and config.pretrained:
        raise ConfigError("method.backbone.pretrained=True is not allowed with stem=cifar: timm has no such weights")
    kwargs = backbone_arguments(config)
    if not config.zero_init_residual:
        kwargs["zero_init_last"] = False
    drop_path = config.drop_path if drop_path is None else drop_path
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    try:
        backbone: nn.Module = timm.create_model(name, pretrained=config.pretrained, num_classes=0, **kwargs)
    except (TypeError, AssertionError) as error:
        options = {option: getattr(config, option) for option in ("channels", *_TRANSFORMER_OPTIONS)}
        options["zero_init_residual"] = None if config.zero_init_residual else False
        given = ", ".join(f"method.backbone.{option}={value}" for option, value in options.items() if value is not None)
        raise ConfigError(f"{given or 'the options'} does not fit {config.name}: {error}") from error
    if isinstance(backbone, VisionTransformer) and backbone.has_class_token and not config.pretrained:
        nn.init.trunc_normal_(backbone.cls_token, std=0.02)  # as DINO and iBOT; timm starts with 1e-6
    if config.layer_scale is not None and not config.pretrained:
        _fill_layer_scale(backbone, config)
    return backbone


def _fill_layer_scale(backbone: nn.Module, config: BackboneConfig) -> None:
    scales = [module for module in backbone.modules() if isinstance(module, LayerScale)]
    if not scales:
        raise ConfigError(
            f"method.backbone.layer_scale={config.layer_scale} is not allowed: {config.name} has no LayerScale"
        )
    for module in scales:
        nn.init.constant_(module.gamma, cast(float, config.layer_scale))


_TRANSFORMER_OPTIONS = {
    "patch_px": "patch_size",
    "image_px": "img_size",
    "depth": "depth",
    "dim": "embed_dim",
    "num_heads": "num_heads",
}
"""Our names -> timm's."""


def backbone_arguments(config: BackboneConfig) -> dict[str, Any]:
    """Return the keyword arguments for `timm.create_model` that its weights depend on, besides name and classes."""
    arguments: dict[str, Any] = {} if config.channels is None else {"channels": config.channels}
    if config.in_channels not in (None, 3):
        arguments["in_chans"] = config.in_channels
    for option, argument in _TRANSFORMER_OPTIONS.items():
        if getattr(config, option) is not None:
            arguments[argument] = getattr(config, option)
    if timm.is_model(config.name) and _is_vision_transformer(config.name):
        arguments["dynamic_img_size"] = True
    return arguments


def _is_vision_transformer(name: str) -> bool:
    """Tell whether the network is timm's VisionTransformer, whose position embeddings can be interpolated."""
    return is_model_in_modules(name, ["vision_transformer", "deit"])


def patch_px(backbone: nn.Module) -> int:
    """Return the size of a Vision Transformer's patch; 1 for networks that take views of any size."""
    if not isinstance(backbone, VisionTransformer):
        return 1
    size: int = backbone.patch_embed.patch_size[0]
    return size


def forward_tokens(
    backbone: VisionTransformer,
    images: Float[Tensor, "batch channels height width"],
    *,
    mask: Bool[Tensor, "batch rows columns"] | None = None,
    mask_token: Float[Tensor, "1 dim"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Forward a Vision Transformer and return all tokens, class token first, normalised.

    Args:
        backbone: the network.
        images: images of any size that the patches divide.
        mask: patches that `mask_token` replaces, before the position embedding; None: no patch.
        mask_token: see `mask`.
    """
    embedded: Tensor = backbone.patch_embed(images)
    if mask is not None:
        assert mask_token is not None
        embedded = torch.where(mask[..., None], mask_token.to(embedded.dtype), embedded)
    # The rest of timm's forward_features, which has no place for a mask token.
    tokens = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(embedded)))
    blocks = (
        partial(checkpoint_seq, backbone.blocks, use_reentrant=False)
        if backbone.grad_checkpointing
        else backbone.blocks
    )
    normalised: Tensor = backbone.norm(blocks(tokens))
    return normalised


def checkpoint_activations(backbone: nn.Module) -> None:
    """Let the backward pass compute the activations inside each block again instead of keeping them.

    Raises:
        ConfigError: timm cannot do this for the network, or its BatchNorm would count every batch twice.
    """
    name = type(backbone).__name__
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
        raise ConfigError(
            f"training.activation_checkpointing=True is not allowed with {name}: its BatchNorm would count every batch twice"
        )
    try:
        cast(Any, backbone).set_grad_checkpointing()
    except (AttributeError, AssertionError) as error:
        raise ConfigError(f"training.activation_checkpointing=True is not allowed with {name}: {error}") from error


def checkpointed_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of Vision Transformers in a module whose activations are computed again."""
    return [block for transformer in _checkpointed(module) for block in transformer.blocks]


@contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Let Vision Transformers in a module forward as if `checkpoint_activations` had not been called."""
    transformers = _checkpointed(module)
    for transformer in transformers:
        transformer.set_grad_checkpointing(enable=False)
    try:
        yield
    finally:
        for transformer in transformers:
            transformer.set_grad_checkpointing()


def _checkpointed(module: nn.Module) -> list[VisionTransformer]:
    return [part for part in module.modules() if isinstance(part, VisionTransformer) and part.grad_checkpointing]


def feature_dim(backbone: nn.Module) -> int:
    """Return D."""
    dim = backbone.num_features
    assert isinstance(dim, int)
    return dim


def export_backbone(backbone: nn.Module, config: BackboneConfig, path: Path) -> None:
    """Write weights and how to rebuild the network as safetensors.

    The metadata are timm's name and arguments, and for a CIFAR stem the module that makes timm know the name.
    """
    name = config.name if config.stem == "imagenet" else _CIFAR_NAME.format(name=config.name)
    metadata = {"timm_name": name, "timm_arguments": json.dumps(backbone_arguments(config))}
    if config.stem == "cifar":
        metadata["timm_import"] = __name__
    state = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(save(state, metadata=metadata))  # a file of `save_file` can be read by its owner only
    temporary.replace(path)


def load_exported_backbone(path: str | Path) -> nn.Module:
    """Build the encoder of an exported file, in evaluation mode.

    Raises:
        CheckpointError: no such file, or not one that `export_backbone` wrote.
    """
    shapes, metadata = _read_header(Path(path))
    if "timm_name" not in metadata:
        raise CheckpointError(f"{path} does not say which network it holds; expected a backbone.safetensors of a run")
    name, arguments = _described_network(Path(path), metadata, num_tensors=len(shapes))
    try:
        with torch.device("meta"):  # shapes without memory: the file may describe a network of any size
            imagined: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        _check_shapes(shapes, imagined)
        backbone: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        backbone.load_state_dict(load_file(path))
    except Exception as error:
        raise CheckpointError(f"{path} does not hold the network {name} that it names: {first_line(error)}") from error
    return backbone.eval()


def _read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of the tensors and the metadata of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: no safetensors. Pickled weights are never opened, because opening them can run a program.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (no dict)
            return shapes, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {first_line(error)}. Pickled weights (.pt, .pth, .bin) are not read, "
            f"because that can run a program; convert weights that you trust to safetensors"
        ) from error


_ALLOWED_ARGUMENTS = {"channels", "in_chans", "dynamic_img_size", *_TRANSFORMER_OPTIONS.values()}
"""Names of the arguments that `backbone_arguments` writes."""


def _described_network(path: Path, metadata: dict[str, str], *, num_tensors: int) -> tuple[str, dict[str, Any]]:
    """Return timm's name and arguments, if `export_backbone` can have written them.

    Some names make timm fetch from a hub or a folder, and some arguments name files. Both are refused.
    """
    name = metadata["timm_name"]
    try:
        arguments = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in json.loads(metadata.get("timm_arguments", "{}")).items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say how its network is built: {first_line(error)}") from error
    numbers = [number for value in arguments.values() for number in (value if isinstance(value, tuple) else (value,))]
    are_numbers = all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers)
    if not timm.is_model(name) or not _ALLOWED_ARGUMENTS.issuperset(arguments) or not are_numbers:
        raise CheckpointError(
            f"{path} names the network {name[:100]!r} with {sorted(arguments)[:20]}; expected a name of timm's and whole "
            f"numbers for {', '.join(sorted(_ALLOWED_ARGUMENTS))}"
        )
    depth = arguments.get("depth", 0)
    if isinstance(depth, int) and depth > num_tensors:
        raise CheckpointError(f"{path} has {num_tensors} tensors, fewer than the network's {depth=}")
    return name, arguments


def _check_shapes(found: dict[str, tuple[int, ...]], network: nn.Module) -> None:
    """Compare names and shapes before memory is allocated for them.

    Raises:
        ValueError: they belong to another network; the message has the first difference.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{name[:100]} has the shape {found.get(name, 'of nothing')}, the network's has "
                f"{expected.get(name, 'none of this name')}"
            )


_CIFAR_RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


default_cfgs = generate_default_cfgs(
    {_CIFAR_NAME.format(name=name): {"first_conv": "conv1", "classifier": "fc"} for name in _CIFAR_RESNETS}
)
"""`register_model` looks for this name."""


CIFAR_LAYERS = {name: layers for name, (_, layers) in _CIFAR_RESNETS.items()}
"""Network with CIFAR stem -> number of blocks of each stage."""


def _build_cifar_resnet(**network: Any) -> ResNet:
    model = ResNet(**network)
    width = model.conv1.out_channels
    model.conv1 = nn.Conv2d(model.conv1.in_channels, width, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _register(name: str) -> None:
    block, layers = _CIFAR_RESNETS[name]
    timm_name = _CIFAR_NAME.format(name=name)

    def build(pretrained: bool = False, **kwargs: Any) -> ResNet:  # noqa: FBT001, FBT002 (timm's signature)
        network: ResNet = build_model_with_cfg(
            _build_cifar_resnet, timm_name, pretrained, block=block, layers=layers, **kwargs
        )
        return network

    build.__name__ = timm_name
    build.__module__ = __name__
    register_model(build)


for _name in _CIFAR_RESNETS:
    if not timm.is_model(_CIFAR_NAME.format(name=_name)):
        _register(_name)
