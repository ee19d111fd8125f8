"""Recipes for images of one's own: settings are a function of the images and of what trains on them.

`runs/fit_recipe.py` looks at the images and the machine, calls these functions, and measures how many images fit a step.
The rules are this project's; every setting can be given instead.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from hvp_ray.config import (
    BackboneConfig,
    DataConfig,
    MaskConfig,
    MethodConfig,
    OptimizerConfig,
    RunConfig,
    SelectionConfig,
    TrackingConfig,
    TrainingConfig,
    TransformConfig,
    ViewGroupConfig,
    ViewsConfig,
)
from hvp_ray.methods.configs import DinoConfig, DinoV2Config, SimCLRConfig, SimSiamConfig
from hvp_ray.recipes.data_sets import dino_multi_crop
from hvp_ray.recipes.dino import VIT_OPTIMIZER

OwnMethod = Literal["simsiam", "simclr", "dino", "dinov2"]
_MULTI_CROP = ("dino", "dinov2")

SIZES_PX = (32, 64, 96, 128, 160, 224)
"""Sizes of views; the largest one that most images have is taken."""
_CPU_MOST_PX = 64
_CIFAR_STEMS = ("resnet10", "resnet18", "resnet34", "resnet50")
_IMAGES_SEEN = {"cuda": 20_000_000, "cpu": 500_000}
"""Images that a run from random weights passes over: 400 epochs of 50,000 images on a GPU, 50 of 10,000 on CPUs."""
_FROM_WEIGHTS = 0.25
"""Length of a run from released weights, as a fraction of a run from random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What a recipe adapts itself to."""

    num_images: int
    """To train on."""
    shorter_px: int
    """Median of the images' shorter sides."""
    size_px: int | None = None
    """Size of the views. None: the images decide."""
    network: str | None = None
    """timm's name. None: method, views and device decide."""
    epochs: int | None = None
    """Length. None: the number of images, the device and the weights decide."""
    device: Literal["cpu", "cuda"] = "cuda"
    starts_from_weights: bool = False
    """Released weights, or those of an earlier run."""


USUAL = Circumstances(num_images=100_000, shorter_px=224)
"""Circumstances whose settings `--help` shows."""
UNUSUAL = Circumstances(num_images=10, shorter_px=20, device="cpu")
"""Different circumstances. A setting that parses to one value from both must have come from the user."""


def own(method: OwnMethod, of: Circumstances) -> RunConfig:
    """Return the recipe `<method>-own` under these circumstances, before images per step are measured."""
    on_gpu = of.device == "cuda"
    allowed = [px for px in SIZES_PX if px <= of.shorter_px and (on_gpu or px <= _CPU_MOST_PX)]
    size_px = of.size_px or (allowed[-1] if allowed else SIZES_PX[0])
    seen = _IMAGES_SEEN[of.device] * (_FROM_WEIGHTS if of.starts_from_weights else 1.0)
    epochs = of.epochs or max(5, min(800, round(seen / of.num_images)))
    optimizer = _optimizer(method, epochs)
    if of.starts_from_weights:
        optimizer = dataclasses.replace(
            optimizer, learning_rate_per_256=optimizer.learning_rate_per_256 / 10, layer_decay=0.75
        )
    backbone = _named(of.network, size_px, of) if of.network else _chosen(method, size_px, of)
    return RunConfig(
        recipe=f"{method}-own",
        data=DataConfig(source="path/to/images"),
        views=_views(method, size_px, backbone.patch_px),
        selection=_selection(method),
        method=_method(method, backbone, epochs, on_gpu=on_gpu),
        optimizer=optimizer,
        training=TrainingConfig(
            epochs=epochs,
            images_per_step=256 if on_gpu else 64,
            checkpoint_every_steps=500,
            precision="bfloat16" if on_gpu else "float32",
        ),
        tracking=TrackingConfig(log_every_steps=10),
    )


def _chosen(method: OwnMethod, size_px: int, of: Circumstances) -> BackboneConfig:
    """Return ResNet-50 (small images: ResNet-18 with a CIFAR stem) or ViT-S for a GPU, a narrow ResNet-18 or ViT for CPUs."""
    if method == "dinov2":
        vit = _named("vit_small_patch14_reg4_dinov2", size_px, of)
        is_narrow = of.device == "cpu" and not of.starts_from_weights
        return dataclasses.replace(vit, dim=192, depth=6, num_heads=3) if is_narrow else vit
    if of.device == "cpu":
        channels = None if of.starts_from_weights else (16, 32, 64, 128)
        return BackboneConfig(name="resnet18", stem="cifar" if size_px <= 32 else "imagenet", channels=channels)
    if method == "dino":
        return _named("vit_small_patch16_224", size_px, of)
    return BackboneConfig(name="resnet18", stem="cifar") if size_px <= 64 else BackboneConfig(name="resnet50")


def _named(network: str, size_px: int, of: Circumstances) -> BackboneConfig:
    """Return a network for views of a size: small ones get small patches, or a CIFAR stem where there is one."""
    if network.startswith(("vit_", "deit_")):
        largest_px = 14 if "patch14" in network and size_px % 14 == 0 else 16
        patch_px = largest_px if size_px >= 160 else 8 if size_px >= 64 else 4
        # DINOv2's 1e-5 is for deep networks and long runs; CaiT's rule starts up to 18 blocks at 0.1. Released weights of a
        # network without LayerScale were trained as if it were 1.
        has_layer_scale, start = "dinov2" in network, 1.0 if of.starts_from_weights else 0.1
        layer_scale = start if has_layer_scale else None
        return BackboneConfig(name=network, image_px=size_px, patch_px=patch_px, drop_path=0.1, layer_scale=layer_scale)
    return BackboneConfig(name=network, stem="cifar" if size_px <= 32 and network in _CIFAR_STEMS else "imagenet")


def _views(method: OwnMethod, size_px: int, patch_px: int | None) -> ViewsConfig:
    resize_px = size_px if size_px <= 32 else round(size_px * 8 / 7)
    blurs = size_px > 32
    if method in _MULTI_CROP:
        cell_px = 14 if patch_px == 14 else 16
        local_px = max(cell_px, size_px * 3 // 7 // cell_px * cell_px)
        global_views, local_views = dino_multi_crop(
            global_px=size_px, global_scale=(0.4, 1.0), local_px=local_px, local_scale=(0.05, 0.4), blur=blurs
        )
        return ViewsConfig(
            global_views=global_views,
            local_views=local_views,
            masks=MaskConfig(patch_px=patch_px or 16, min_block_patches=4) if method == "dinov2" else None,
            evaluation_resize_px=resize_px,
            evaluation_interpolation="bicubic",
        )
    transform = TransformConfig(blur_probability=0.5 if blurs else 0.0)
    if method == "simclr":
        transform = dataclasses.replace(transform, brightness=0.8, contrast=0.8, saturation=0.8, hue_turns=0.2)
    return ViewsConfig(global_views=ViewGroupConfig(size_px=size_px, even=transform), evaluation_resize_px=resize_px)


def _selection(method: OwnMethod) -> SelectionConfig:
    if method in _MULTI_CROP:
        return SelectionConfig(num_views=None, num_global_views=4, num_local_views=8, num_chosen_local_views=4)
    return SelectionConfig()


def _method(method: OwnMethod, backbone: BackboneConfig, epochs: int, *, on_gpu: bool) -> MethodConfig:
    match method:
        case "simsiam":
            width = 2048 if on_gpu else 512
            return SimSiamConfig(
                backbone=backbone,
                projector_layers=3 if on_gpu else 2,
                projector_dim=width,
                projector_hidden_dim=width,
                predictor_hidden_dim=width // 4,
            )
        case "simclr":
            return SimCLRConfig(
                backbone=backbone,
                projector_hidden_dim=2048 if on_gpu else 256,
                projector_dim=128,
                temperature=0.2,
            )
        case "dino":
            return DinoConfig(backbone=backbone, num_prototypes=16_384 if on_gpu else 1024, teacher_momentum=0.996)
        case "dinov2":
            prototypes, hidden_dim, warmup = 16_384 if on_gpu else 1024, 2048 if on_gpu else 512, min(30, epochs // 3)
            return DinoV2Config(
                backbone=backbone,
                num_prototypes=prototypes,
                num_patch_prototypes=prototypes,
                head_hidden_dim=hidden_dim,
                patch_head_hidden_dim=hidden_dim,
                warmup_teacher_epochs=warmup,
                warmup_patch_teacher_epochs=warmup,
                teacher_momentum=0.996,
            )


def _optimizer(method: OwnMethod, epochs: int) -> OptimizerConfig:
    warmup = min(10.0, epochs / 10)
    if method in _MULTI_CROP:
        decay = 0.9 if method == "dinov2" else VIT_OPTIMIZER.layer_decay
        return dataclasses.replace(VIT_OPTIMIZER, warmup_epochs=warmup, layer_decay=decay)
    return OptimizerConfig(
        learning_rate_per_256=0.05 if method == "simsiam" else 0.3,
        weight_decay=1e-4,
        schedule="cosine-per-step",
        warmup_epochs=0.0 if method == "simsiam" else warmup,
    )


def simsiam_own() -> RunConfig:
    """Your images: size, network, length and images per step are chosen for them and printed; needs --data.source.

    hvp-ray pretrain simsiam-own --data.source path/to/images

    Settings are this project's, after SimSiam's for ImageNet and CIFAR-10. A step may have few images.
    No reference number. Not yet run to its end by this project.
    """
    return own("simsiam", USUAL)


def simclr_own() -> RunConfig:
    """Your images, as simsiam-own, with SimCLR, which needs many images per step; needs --data.source.

    hvp-ray pretrain simclr-own --data.source path/to/images

    Settings are this project's, after SimCLR's for ImageNet. No reference number. Not yet run to its end by
    this project.
    """
    return own("simclr", USUAL)


def dino_own() -> RunConfig:
    """Your images, as simsiam-own, with DINO (on a GPU a ViT-S); needs --data.source.

    hvp-ray pretrain dino-own --data.source path/to/images

    Settings are this project's, after DINO's for ImageNet. No reference number. Not yet run to its end by
    this project.
    """
    return own("dino", USUAL)


def dinov2_own() -> RunConfig:
    """Your images, as simsiam-own, with DINOv2 (on a GPU a ViT-S, on CPUs a narrow one); needs --data.source.

    hvp-ray pretrain dinov2-own --data.source path/to/images \
        --training.initial_weights dinov2_vits14_reg4_pretrain.pth

    Settings are this project's, after DINOv2's for ImageNet; without released weights, LayerScale starts at 0.1.
    No reference number. Not yet run to its end by this project.
    """
    return own("dinov2", USUAL)


OWN_RECIPES: dict[str, Callable[[Circumstances], RunConfig]] = {
    f"{method}-own": partial(own, method) for method in get_args(OwnMethod)
}
