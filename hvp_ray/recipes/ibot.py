"""Recipes of iBOT with hard views. Sources of the settings: HVP's published code (branch ibot, rapanti/ibot)."""

import dataclasses

from hvp_ray.config import (
    BackboneConfig,
    MaskConfig,
    RunConfig,
    SelectionConfig,
    TrackingConfig,
    TrainingConfig,
    ViewGroupConfig,
)
from hvp_ray.methods.configs import IBotConfig
from hvp_ray.recipes import data_sets
from hvp_ray.recipes.dino import VIT_OPTIMIZER, cifar_transformer, tiny_transformer

_OPTIMIZER = dataclasses.replace(VIT_OPTIMIZER, clip_scope="tensor")
_SELECTION = SelectionConfig(num_views=None, num_global_views=4, num_local_views=4, num_chosen_local_views=2, every=3)


def ibot_digits() -> RunConfig:
    """Smoke test: the embedded scanned digits, a tiny Vision Transformer at 16 px; five minutes on 2 CPU cores.

    hvp-ray pretrain ibot-digits
    """
    return RunConfig(
        recipe="ibot-digits",
        data=data_sets.DIGITS,
        views=data_sets.digits_views(
            ViewGroupConfig(size_px=16, even=data_sets.digits_transform((0.5, 1.0))),
            ViewGroupConfig(size_px=8, even=data_sets.digits_transform((0.2, 0.5))),
            MaskConfig(patch_px=4),
        ),
        selection=dataclasses.replace(_SELECTION, every=1),
        method=IBotConfig(
            backbone=tiny_transformer(),
            num_prototypes=256,
            head_hidden_dim=128,
            head_bottleneck_dim=64,
            teacher_temperature=0.01,
            patch_teacher_temperature=0.02,
            warmup_patch_teacher_epochs=0,
        ),
        optimizer=dataclasses.replace(_OPTIMIZER, learning_rate_per_256=4e-3, final_weight_decay=0.1, warmup_epochs=6),
        training=TrainingConfig(epochs=24, images_per_step=32, checkpoint_every_steps=400),
        tracking=TrackingConfig(log_every_steps=5),
    )


def ibot_cifar10() -> RunConfig:
    """CIFAR-10, ViT-Ti/4 at 32 px with local views of 16 px, 300 epochs; for one GPU.

    hvp-ray pretrain ibot-cifar10 --data.source cifar10-train.parquet \
        --data.test_source cifar10-test.parquet

    Settings are this project's, after the ImageNet recipe; blur is off at this size. No reference number. Not yet run by
    this project.
    """
    global_views, local_views = data_sets.dino_multi_crop(
        global_px=32, global_scale=(0.3, 1.0), local_px=16, local_scale=(0.1, 0.4), blur=False
    )
    return RunConfig(
        recipe="ibot-cifar10",
        data=data_sets.CIFAR10,
        views=data_sets.cifar10_views(global_views, local_views, MaskConfig(patch_px=4)),
        selection=dataclasses.replace(_SELECTION, every=1),
        method=IBotConfig(backbone=cifar_transformer(), num_prototypes=4096),
        optimizer=_OPTIMIZER,
        training=TrainingConfig(
            epochs=300, images_per_step=512, checkpoint_every_steps=1000, precision="bfloat16", torch_threads=2
        ),
        tracking=data_sets.CIFAR10_TRACKING,
    )


def ibot_imagenet_vits16_100ep() -> RunConfig:
    """ImageNet, ViT-S/16, 100 epochs, 4 + 4 views of which 2 + 2 are trained on, every third step hard; for GPUs.

    hvp-ray pretrain ibot-imagenet-vits16-100ep --data.source imagenet/train \
        --data.test_source imagenet/val --cluster.num_trainers 4

    Source: rapanti/ibot job.sh (4 GPUs with 128 images each, hard views every third step) over the defaults of
    automl/hvp, branch ibot, main_ibot.py. Expected: no number was found. Differs: bfloat16; a Gaussian kernel of 9 px
    instead of PIL's blur radius; even and odd views have different transforms, while branch ibot gives all but the first
    the second one. Not yet run by this project.
    """
    global_views, local_views = data_sets.dino_multi_crop(
        global_px=224, global_scale=(0.14, 1.0), local_px=96, local_scale=(0.05, 0.4)
    )
    return RunConfig(
        recipe="ibot-imagenet-vits16-100ep",
        data=data_sets.IMAGENET,
        views=data_sets.imagenet_views(
            global_views, local_views, MaskConfig(patch_px=16), evaluation_interpolation="bicubic"
        ),
        selection=_SELECTION,
        method=IBotConfig(backbone=BackboneConfig(name="vit_small_patch16_224", drop_path=0.1)),
        optimizer=_OPTIMIZER,
        training=TrainingConfig(
            epochs=100, images_per_step=512, checkpoint_every_steps=2500, precision="bfloat16", torch_threads=4
        ),
        tracking=data_sets.IMAGENET_TRACKING,
    )
