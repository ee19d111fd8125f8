"""Recipes of DINO with hard views. Sources of the settings: HVP's published configs (branch dino) and DINO's README."""

import dataclasses

from hvp_ray.config import (
    BackboneConfig,
    OptimizerConfig,
    RunConfig,
    SelectionConfig,
    TrackingConfig,
    TrainingConfig,
    ViewGroupConfig,
)
from hvp_ray.methods.configs import DinoConfig
from hvp_ray.recipes import data_sets

VIT_OPTIMIZER = OptimizerConfig(
    name="adamw",
    learning_rate_per_256=5e-4,
    weight_decay=0.04,
    final_weight_decay=0.4,
    decay_exempts_vectors=True,
    schedule="cosine-per-step",
    warmup_epochs=10,
    final_learning_rate=1e-6,
    constant_predictor_rate=False,
    clip_gradient_norm=3.0,
)
"""DINO's and iBOT's AdamW for Vision Transformers on ImageNet."""


def dino_digits() -> RunConfig:
    """Smoke test: the embedded scanned digits, a narrow ResNet-10 at 8 px with local views of 6 px; on 2 CPU cores.

    hvp-ray pretrain dino-digits
    """
    return RunConfig(
        recipe="dino-digits",
        data=data_sets.DIGITS,
        views=data_sets.digits_views(
            ViewGroupConfig(size_px=8, even=data_sets.digits_transform((0.5, 1.0))),
            ViewGroupConfig(size_px=6, even=data_sets.digits_transform((0.2, 0.5))),
        ),
        selection=SelectionConfig(num_views=None, num_global_views=4, num_local_views=4, num_chosen_local_views=2),
        method=DinoConfig(
            backbone=BackboneConfig(name="resnet10", stem="cifar", channels=(16, 32, 64, 128)),
            num_prototypes=256,
            head_hidden_dim=128,
            head_bottleneck_dim=64,
            teacher_temperature=0.02,
            teacher_momentum=0.99,
        ),
        optimizer=dataclasses.replace(
            VIT_OPTIMIZER, learning_rate_per_256=0.016, final_weight_decay=0.1, warmup_epochs=6
        ),
        training=TrainingConfig(epochs=24, images_per_step=32, checkpoint_every_steps=400),
        tracking=TrackingConfig(log_every_steps=5),
    )


def dino_cifar10_small() -> RunConfig:
    """CIFAR-10 on CPUs: a ResNet-10 of a quarter of the width, views of 24 and 12 px; needs --data.source.

    hvp-ray pretrain dino-cifar10-small --data.source cifar10-train.parquet \
        --data.test_source cifar10-test.parquet --data.num_images 5000 --training.epochs 2
    """
    global_views, local_views = data_sets.dino_multi_crop(
        global_px=24, global_scale=(0.4, 1.0), local_px=12, local_scale=(0.1, 0.4), blur=False
    )
    digits = dino_digits()
    return dataclasses.replace(
        digits,
        recipe="dino-cifar10-small",
        data=data_sets.CIFAR10,
        views=data_sets.cifar10_views(global_views, local_views),
        selection=SelectionConfig(num_views=None, num_global_views=4, num_local_views=8, num_chosen_local_views=4),
        method=DinoConfig(
            backbone=digits.method.backbone,
            num_prototypes=1024,
            head_hidden_dim=256,
            head_bottleneck_dim=64,
            teacher_temperature=0.04,
            teacher_momentum=0.99,
        ),
        optimizer=dataclasses.replace(digits.optimizer, learning_rate_per_256=0.008, warmup_epochs=1),
        training=TrainingConfig(epochs=20, images_per_step=128, checkpoint_every_steps=200),
        tracking=TrackingConfig(knn_images=5_000),
    )


def tiny_transformer() -> BackboneConfig:
    """Return a Vision Transformer of 16 patches for images of 16 px."""
    return BackboneConfig(
        name="vit_tiny_patch16_224", image_px=16, patch_px=4, dim=64, depth=3, num_heads=2, drop_path=0.05
    )


def cifar_transformer() -> BackboneConfig:
    """Return a ViT-Ti with patches of 4 px for CIFAR-10."""
    return BackboneConfig(name="vit_tiny_patch16_224", image_px=32, patch_px=4, drop_path=0.1)


def dino_cifar10() -> RunConfig:
    """CIFAR-10, ViT-Ti/4 at 32 px with local views of 16 px, 300 epochs; for one GPU.

    hvp-ray pretrain dino-cifar10 --data.source cifar10-train.parquet \
        --data.test_source cifar10-test.parquet

    Settings are this project's, after DINO's 100-epoch recipe; blur is off at this size. No reference number. Not yet
    run by this project.
    """
    global_views, local_views = data_sets.dino_multi_crop(
        global_px=32, global_scale=(0.4, 1.0), local_px=16, local_scale=(0.1, 0.4), blur=False
    )
    return RunConfig(
        recipe="dino-cifar10",
        data=data_sets.CIFAR10,
        views=data_sets.cifar10_views(global_views, local_views),
        selection=SelectionConfig(num_views=None, num_global_views=4, num_local_views=8, num_chosen_local_views=4),
        method=DinoConfig(backbone=cifar_transformer(), num_prototypes=4096),
        optimizer=VIT_OPTIMIZER,
        training=TrainingConfig(
            epochs=300, images_per_step=512, checkpoint_every_steps=1000, precision="bfloat16", torch_threads=2
        ),
        tracking=data_sets.CIFAR10_TRACKING,
    )


def dino_imagenet_vits16_100ep() -> RunConfig:
    """ImageNet, ViT-S/16, 100 epochs, 4 + 16 views of which 2 + 8 are trained on, 512 images per step; for GPUs.

    hvp-ray pretrain dino-imagenet-vits16-100ep --data.source imagenet/train \
        --data.test_source imagenet/val --cluster.num_trainers 8

    Source: automl/hvp, branch dino, configs/ImageNet/pretrain_default.yaml, 512 images as in its run names, 128 candidates
    (`selection.limit`) as in its speed test. --selection.limit None takes the exact maximum, which is harder, at no cost.
    Expected: 74.67 linear with hard views, 73.5 with random views (the authors' plots); DINO's README has 74.0 linear and
    69.3 k-NN for random views, 1.75 days on 8 GPUs of 2021. Differs: bfloat16, position embeddings interpolated with
    antialiasing. Not yet run by this project.
    """
    global_views, local_views = data_sets.dino_multi_crop(
        global_px=224, global_scale=(0.4, 1.0), local_px=96, local_scale=(0.05, 0.4)
    )
    return RunConfig(
        recipe="dino-imagenet-vits16-100ep",
        data=data_sets.IMAGENET,
        views=data_sets.imagenet_views(global_views, local_views, evaluation_interpolation="bicubic"),
        selection=SelectionConfig(
            num_views=None, num_global_views=4, num_local_views=16, num_chosen_local_views=8, limit=128
        ),
        method=DinoConfig(backbone=BackboneConfig(name="vit_small_patch16_224", drop_path=0.1)),
        optimizer=VIT_OPTIMIZER,
        training=TrainingConfig(
            epochs=100, images_per_step=512, checkpoint_every_steps=2500, precision="bfloat16", torch_threads=4
        ),
        tracking=data_sets.IMAGENET_TRACKING,
    )


def dino_imagenet_vits16_800ep() -> RunConfig:
    """ImageNet, ViT-S/16, 800 epochs, 4 + 16 views of which 2 + 10 are trained on, 1,024 images per step; for GPUs.

    hvp-ray pretrain dino-imagenet-vits16-800ep --data.source imagenet/train \
        --data.test_source imagenet/val --cluster.num_trainers 16

    Source: automl/hvp, dino-wds example_config__juwels_pretrain.yaml (16 GPUs; no clipping, 64 candidates), which is
    DINO's published ViT-S/16 recipe with hard views. Expected: 76.9 linear and 74.0 k-NN with hard views every third step
    (the authors' plot, one seed); 77.0 and 74.5 with random views (DINO's README). Not yet run by this project.
    """
    global_views, local_views = data_sets.dino_multi_crop(
        global_px=224, global_scale=(0.25, 1.0), local_px=96, local_scale=(0.05, 0.25)
    )
    return RunConfig(
        recipe="dino-imagenet-vits16-800ep",
        data=data_sets.IMAGENET,
        views=data_sets.imagenet_views(global_views, local_views, evaluation_interpolation="bicubic"),
        selection=SelectionConfig(
            num_views=None, num_global_views=4, num_local_views=16, num_chosen_local_views=10, limit=64
        ),
        method=DinoConfig(
            backbone=BackboneConfig(name="vit_small_patch16_224", drop_path=0.1),
            norm_last_layer=False,
            teacher_temperature=0.07,
            warmup_teacher_epochs=30,
        ),
        optimizer=dataclasses.replace(VIT_OPTIMIZER, final_learning_rate=1e-5, clip_gradient_norm=None),
        training=TrainingConfig(epochs=800, images_per_step=1024, checkpoint_every_steps=2500, torch_threads=4),
        tracking=data_sets.IMAGENET_TRACKING,
    )


def dino_imagenet_r50_100ep() -> RunConfig:
    """ImageNet, ResNet-50, 100 epochs, inferred: 4 + 16 views of which 2 + 8 are trained on; for GPUs.

    hvp-ray pretrain dino-imagenet-r50-100ep --data.source imagenet/train \
        --data.test_source imagenet/val --cluster.num_trainers 8

    Inferred: the HVP authors published no config of it. These are the settings of DINO's README for ResNet-50 (SGD, 0.03,
    weight decay 1e-4, crops 0.14-1 and 0.05-0.14) with the view counts of the ViT-S/16 recipe. Residual branches start at
    1, as in torchvision's network, which DINO trains. Expected: no number with hard views at 100 epochs was found. Not yet
    run by this project.
    """
    global_views, local_views = data_sets.dino_multi_crop(
        global_px=224, global_scale=(0.14, 1.0), local_px=96, local_scale=(0.05, 0.14)
    )
    return RunConfig(
        recipe="dino-imagenet-r50-100ep",
        data=data_sets.IMAGENET,
        views=data_sets.imagenet_views(global_views, local_views, evaluation_interpolation="bicubic"),
        selection=SelectionConfig(
            num_views=None, num_global_views=4, num_local_views=16, num_chosen_local_views=8, limit=128
        ),
        method=DinoConfig(backbone=BackboneConfig(name="resnet50", zero_init_residual=False)),
        optimizer=dataclasses.replace(
            VIT_OPTIMIZER, name="sgd", learning_rate_per_256=0.03, weight_decay=1e-4, final_weight_decay=None
        ),
        training=TrainingConfig(
            epochs=100, images_per_step=512, checkpoint_every_steps=2500, precision="bfloat16", torch_threads=4
        ),
        tracking=data_sets.IMAGENET_TRACKING,
    )
