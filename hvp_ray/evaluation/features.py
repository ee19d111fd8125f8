"""Turn images into centre crops and features, without augmentation."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hvp_ray.config import DataConfig, ViewsConfig
from hvp_ray.data.dataset import Dataset
from hvp_ray.data.decode import decode_pixels
from hvp_ray.data.source import Source
from hvp_ray.errors import ConfigError, TrainingError, UnreadableImageError
from hvp_ray.stream.reading import read_images
from hvp_ray.views.normalise import normalise_views


def load_evaluation_pixels(
    source: Source, sample_ids: NDArray[np.int64], views: ViewsConfig, data: DataConfig
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return ([N, S, S, C], readable ids): resize the shorter side to `evaluation_resize_px` and crop the centre.

    Unreadable images are left out.

    Raises:
        DataError: the storage failed repeatedly.
    """
    size_px = views.global_views.size_px
    # Filled in place: a list of crops would be a second copy.
    crops = np.empty((len(sample_ids), size_px, size_px, data.channels), np.uint8)
    kept: list[int] = []
    for sample_id in sample_ids.tolist():
        try:
            image = read_images(source, [sample_id]).images[0]
            pixels = decode_pixels(image, data)
        except UnreadableImageError:
            continue
        crops[len(kept)] = centre_crop(pixels, views)
        kept.append(sample_id)
    return crops[: len(kept)], np.array(kept, dtype=np.int64)


def load_some_pixels(dataset: Dataset, views: ViewsConfig, data: DataConfig, *, count: int) -> NDArray[np.uint8]:
    """Return at most `count` centre crops, [N, S, S, C], spread over the test images, or training images if there are none.

    Raises:
        DataError: the storage failed repeatedly.
    """
    source, ids = dataset.test_source, dataset.test_ids
    if not len(ids):
        source, ids = dataset.source, dataset.training_ids
    rows = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(np.int64)
    return load_evaluation_pixels(source, ids[rows], views, data)[0]


def centre_crop(pixels: NDArray[np.uint8], views: ViewsConfig) -> NDArray[np.uint8]:
    """Resize and crop as torchvision's Resize and CenterCrop: truncate the longer side, round the margin half to even."""
    resize_px, size_px = views.evaluation_resize_px, views.global_views.size_px
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    size = (int(resize_px * height / shorter), int(resize_px * width / shorter))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    mode = views.evaluation_interpolation
    resized = F.interpolate(tensor, size=size, mode=mode, align_corners=False, antialias=True)[0]
    top, left = round((size[0] - size_px) / 2), round((size[1] - size_px) / 2)
    crop = resized[:, top : top + size_px, left : left + size_px].permute(1, 2, 0)
    return crop.numpy()


def check_last_blocks(backbone: nn.Module, last_blocks: int) -> None:
    """Check that the encoder has this many blocks with a class token.

    Raises:
        ConfigError: more than one block of a network without class tokens, or more blocks than it has.
    """
    if last_blocks == 1:
        return
    if not isinstance(backbone, VisionTransformer) or not backbone.has_class_token:
        raise ConfigError(
            f"{last_blocks=} is not allowed: {type(backbone).__name__} has no class token after every block; use 1"
        )
    if not 1 <= last_blocks <= len(backbone.blocks):
        raise ConfigError(f"{last_blocks=} is not allowed: 1 to {len(backbone.blocks)}, the encoder's depth")


def extract_features(
    backbone: nn.Module,
    pixels: NDArray[np.uint8],
    views: ViewsConfig,
    *,
    device: torch.device,
    last_blocks: int = 1,
) -> Float[Tensor, "images dim"]:
    """Return pooled features in evaluation mode; the module's mode is restored.

    Args:
        backbone: the encoder.
        pixels: [N, S, S, C].
        views: mean and standard deviation of the channels.
        device: device of the encoder.
        last_blocks: above 1, concatenate the class tokens of the last blocks of a Vision Transformer, each after the
            final norm, the last block at the end. DINO's linear protocol takes 4 of a ViT-S, 1 of a ViT-B.

    Raises:
        ConfigError: see `check_last_blocks`.
        TrainingError: a feature is not finite, so the weights have diverged.
    """
    check_last_blocks(backbone, last_blocks)
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            parts = [
                _forward(backbone, normalise_views(torch.from_numpy(chunk).to(device), views), last_blocks).float()
                for chunk in np.array_split(pixels, max(1, len(pixels) // 256))
            ]
    finally:
        backbone.train(was_training)
    features = torch.cat(parts)
    num_broken = int((~features.isfinite()).any(dim=1).sum())
    if num_broken:
        raise TrainingError(
            f"the encoder's features of {num_broken} of {len(features)} images are not finite numbers, so its weights have "
            f"diverged. Evaluate an earlier checkpoint, or train again with a lower learning rate"
        )
    return features


def _forward(
    backbone: nn.Module, images: Float[Tensor, "batch channels height width"], last_blocks: int
) -> Float[Tensor, "batch dim"]:
    if last_blocks == 1:
        pooled: Tensor = backbone(images)
        return pooled
    assert isinstance(backbone, VisionTransformer)
    blocks = backbone.forward_intermediates(
        images, indices=last_blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    return torch.cat([prefix[:, 0] for _, prefix in blocks], dim=1)
