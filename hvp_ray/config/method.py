"""The encoder, and the common settings of all methods; `hvp_ray.methods.configs` has the methods of the package."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hvp_ray.config.checks import AtLeast1, Checked, Fraction, Positive


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig(Checked):
    """The encoder, from timm: a ResNet or a Vision Transformer."""

    path: ClassVar[str] = "method.backbone"

    name: str
    """timm's model name, for instance resnet50 or vit_small_patch16_224."""

    pretrained: bool = False
    """Start from timm's pretrained weights, which timm fetches from its hub."""

    stem: Literal["imagenet", "cifar"] = "imagenet"
    """ResNets: cifar is a 3x3 convolution of stride 1 without max-pooling, for images of 16 to 64 px."""

    zero_init_residual: bool = True
    """ResNets: the last BatchNorm of each residual branch starts at 0 (SimSiam, SimCLR). False: at 1 (DINO)."""

    in_channels: AtLeast1 | None = None
    """Channels of the images. None: `data.channels`."""

    channels: tuple[AtLeast1, ...] | None = None
    """ResNets: widths of the stages, for small experiments. None: those of the named model."""

    drop_path: Fraction = 0.0
    """Stochastic depth of the trained encoder, rising linearly to this in the last block. Teachers have none."""

    layer_scale: Positive | None = None
    """Vision Transformers with LayerScale (DINOv2's): initial weight of each residual branch. None: that of the named model
    (DINOv2's 1e-5, with which short runs hardly learn). Weights to start from that have LayerScale replace it."""

    patch_px: AtLeast1 | None = None
    """Vision Transformers: height and width of a patch. None: those of the named model."""

    image_px: AtLeast1 | None = None
    """Vision Transformers: resolution of the grid of position embeddings, which are interpolated for views of other sizes.
    None: that of the named model."""

    depth: AtLeast1 | None = None
    """Vision Transformers: number of blocks, for small experiments. None: that of the named model."""

    dim: AtLeast1 | None = None
    """Vision Transformers: width, for small experiments. None: that of the named model."""

    num_heads: AtLeast1 | None = None
    """Vision Transformers: attention heads, for small experiments. None: those of the named model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig(Checked):
    """Settings of all methods. A method's config derives from it and names its implementation (docs/new_method.md)."""

    path: ClassVar[str] = "method"

    name: ClassVar[str]
    """Name of the method, as logged."""

    implementation: ClassVar[str]
    """`module:class` of the `hvp_ray.methods.method.Method` that is built from this config."""

    uses_local_views: ClassVar[bool] = False
    """Whether the method is a multi-crop method."""

    uses_masks: ClassVar[bool] = False
    """Whether the method needs masks of the global views."""

    contrasts_images: ClassVar[bool] = False
    """Whether the loss of an image has other images as negatives."""

    backbone: BackboneConfig

    @property
    def trains_on_pairs(self) -> bool:
        """Whether the loss of more than two views is a mean over pairs, which can be weighted."""
        return True
