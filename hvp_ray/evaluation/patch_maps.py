"""What a Vision Transformer sees in an image: attention of the class token, and principal components of patch features."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hvp_ray.config import ViewsConfig
from hvp_ray.views.normalise import normalise_views


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PatchMaps:
    """Maps of N images, one cell per patch."""

    attention: NDArray[np.float32]
    """[N, heads, rows, columns], attention of the class token to the patches in the last block. The class token's attention
    to itself is left out, so a map sums to less than 1."""
    components: NDArray[np.float32]
    """[N, rows, columns, 3], the first three principal components of the patch features of all images together, as red,
    green and blue from 0 to 1."""


def has_patch_maps(backbone: nn.Module, *, size_px: int) -> bool:
    """Tell whether the encoder attends from a class token to at least 2x2 patches of an image of this size."""
    return (
        isinstance(backbone, VisionTransformer)
        and backbone.has_class_token
        and isinstance(getattr(backbone.blocks[-1], "attn", None), Attention)
        and size_px >= 2 * max(backbone.patch_embed.patch_size)
    )


def compute_patch_maps(
    backbone: nn.Module, pixels: NDArray[np.uint8], views: ViewsConfig, *, device: torch.device
) -> PatchMaps:
    """Forward images in evaluation mode; the module's mode is restored.

    Args:
        backbone: an encoder that `has_patch_maps`.
        pixels: [N, S, S, C].
        views: mean and standard deviation of the channels.
        device: device of the encoder.
    """
    assert isinstance(backbone, VisionTransformer)
    images = normalise_views(torch.from_numpy(pixels).to(device), views)
    height, width = (
        side // patch for side, patch in zip(images.shape[2:], backbone.patch_embed.patch_size, strict=True)
    )
    grid, num_prefix = (height, width), backbone.num_prefix_tokens
    attention_NHTT, tokens_NTD = _attend(backbone, images)
    attention = attention_NHTT[:, :, 0, num_prefix:].unflatten(-1, grid)
    features_NPD = tokens_NTD[:, num_prefix:].float().cpu().numpy()
    return PatchMaps(
        attention=attention.float().cpu().numpy(),
        components=principal_components(features_NPD).reshape(len(pixels), *grid, 3),
    )


def _attend(backbone: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention of the last block, [N, heads, tokens, tokens], and its tokens after the final norm."""
    last = backbone.blocks[-1].attn
    found: list[Tensor] = []
    was_training, was_fused, last.fused_attn = (
        backbone.training,
        last.fused_attn,
        False,
    )  # fused attention shows no weights
    hook = last.attn_drop.register_forward_hook(lambda _module, _inputs, weights: found.append(weights))
    backbone.eval()
    try:
        with torch.no_grad():
            tokens: Tensor = backbone.forward_features(images)
    finally:
        hook.remove()
        last.fused_attn = was_fused
        backbone.train(was_training)
    return found[0], tokens


def principal_components(features_NPD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the first three principal components of all patches, [N, P, 3], each scaled from its 1st to 99th percentile.

    A component points to where its largest weight is positive, so that equal features have equal colours.
    """
    flat = features_NPD.reshape(-1, features_NPD.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]
    values = centred @ axes.T
    low, high = np.percentile(values, [1, 99], axis=0)
    scaled = np.clip((values - low) / np.maximum(high - low, 1e-12), 0.0, 1.0)
    return scaled.reshape(*features_NPD.shape[:2], 3).astype(np.float32)
