"""How views are drawn: transforms, groups of one resolution, masks."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from hvp_ray.config.checks import AtLeast1, Checked, Fraction, Limits, Positive, Range, require

Ratio = Annotated[tuple[float, float], Limits(least=1 / 7, most=7)]
"""Limits of a width / height."""
JitterStrength = Annotated[float, Range(least=0, most=10)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig(Checked):
    """How one view is drawn. Each view draws its own values; probabilities are per view."""

    crop_scale: Annotated[tuple[float, float], Limits(above=0, most=1)] = (0.2, 1.0)
    """Smallest and largest area of the crop, as a fraction of the image's (RandomResizedCrop; SimSiam: 0.2 to 1)."""

    crop_ratio: Ratio = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the crop, drawn log-uniformly (torchvision's default)."""

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling filter, with antialiasing."""

    flip_probability: Fraction = 0.5
    """Probability of a horizontal flip."""

    jitter_probability: Fraction = 0.8
    """Probability of colour jitter: brightness, contrast, saturation and hue, in random order."""

    brightness: JitterStrength = 0.4
    """The brightness factor is drawn from max(0, 1 - x) to 1 + x."""

    contrast: JitterStrength = 0.4
    """The contrast factor is drawn from max(0, 1 - x) to 1 + x, about the mean grey of the crop."""

    saturation: JitterStrength = 0.4
    """The saturation factor is drawn from max(0, 1 - x) to 1 + x."""

    hue_turns: Annotated[float, Range(least=0, most=0.5)] = 0.1
    """The hue shift is drawn from -x to x, in turns of the colour circle."""

    grayscale_probability: Fraction = 0.2
    """Probability of conversion to grey."""

    blur_probability: Fraction = 0.5
    """Probability of Gaussian blur. The authors' SimSiam code blurs with 1 - p (docs/reference_differences.md)."""

    blur_sigma_px: Annotated[tuple[float, float], Limits(above=0)] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the rendered view."""

    blur_kernel_px: AtLeast1 = 9
    """Width of the blur's kernel, an odd number of pixels (SimSiam, DINO: 9; SimCLR: 23)."""

    solarize_probability: Fraction = 0.0
    """Probability of solarization: values of 128 and above are inverted."""

    def check_together(self, prefix: str) -> None:
        """Check that the kernel has a centre."""
        require(self.blur_kernel_px % 2 == 1, f"{prefix}blur_kernel_px", self.blur_kernel_px, "an odd number")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewGroupConfig(Checked):
    """Views of one resolution."""

    size_px: Annotated[int, Range(least=4, most=4096)]
    """Height and width of a rendered view."""

    even: TransformConfig = dataclasses.field(default_factory=TransformConfig)
    """Transform of views 0, 2, 4, ..."""

    odd: TransformConfig | None = None
    """Transform of views 1, 3, 5, ... (DINO's second global transform). None: `even` draws all views."""

    def check_together(self, prefix: str) -> None:
        """Check that the kernels of blurs fit into a view."""
        for name, transform in (("even", self.even), ("odd", self.odd)):
            if transform is not None and transform.blur_probability > 0.0:
                kernel_px = transform.blur_kernel_px
                allowed = f"its half must be smaller than {prefix}size_px={self.size_px}"
                require(kernel_px // 2 < self.size_px, f"{prefix}{name}.blur_kernel_px", kernel_px, allowed)

    def transform_of(self, view_index: int) -> TransformConfig:
        """Return the transform that draws view `view_index`."""
        return self.even if view_index % 2 == 0 or self.odd is None else self.odd


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig(Checked):
    """Block masks of global views, for masked image modelling (iBOT)."""

    path: ClassVar[str] = "views.masks"

    patch_px: AtLeast1
    """Height and width of the encoder's patches. A mask has one cell per patch."""

    unmasked_probability: Fraction = 0.5
    """Probability that a view stays unmasked (iBOT: prediction ratios 0 and 0.3, one of them at random)."""

    ratio: Annotated[tuple[float, float], Limits(least=0, most=1)] = (0.1, 0.5)
    """Smallest and largest fraction of masked patches of a masked view, drawn uniformly (iBOT: 0.3 with a variance of
    0.2)."""

    min_block_patches: AtLeast1 | None = None
    """Smallest area of a block, in patches (DINOv2: 4). None: that of iBOT and BEiT, (grid // 3) squared."""

    block_ratio: Ratio = (0.3, 1 / 0.3)
    """Smallest and largest width / height of a block, drawn log-uniformly (iBOT, BEiT)."""

    def grid(self, size_px: int) -> int:
        """Return the number of cells along a side of a view."""
        return size_px // self.patch_px

    def max_cells(self, size_px: int) -> int:
        """Return the largest number of masked cells of a view."""
        return int(self.ratio[1] * self.grid(size_px) ** 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig(Checked):
    """All views of an image, and how pixels become network inputs."""

    path: ClassVar[str] = "views"

    global_views: ViewGroupConfig
    """The views that pairs are made of."""

    local_views: ViewGroupConfig | None = None
    """Small multi-crop views (DINO, iBOT). None: there are none."""

    masks: MaskConfig | None = None
    """Masks of the global views (iBOT). None: there are none."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, for values from 0 to 1 (ImageNet)."""

    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, for values from 0 to 1 (ImageNet)."""

    evaluation_resize_px: int
    """Evaluation resizes the shorter side to this, then crops the centre to `global_views.size_px` (ImageNet: 256)."""

    evaluation_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Resampling filter of evaluation (HVP authors: bilinear for SimSiam, bicubic for SimCLR, DINO and iBOT)."""

    def check_together(self, prefix: str) -> None:
        """Check that the centre crop and the grid of patches fit the global views."""
        size_px = self.global_views.size_px
        allowed = f"{prefix}global_views.size_px={size_px} or more"
        fits = self.evaluation_resize_px >= size_px
        require(fits, f"{prefix}evaluation_resize_px", self.evaluation_resize_px, allowed)
        if self.masks is not None:
            patch_px = self.masks.patch_px
            allowed = f"a divisor of {prefix}global_views.size_px={size_px} that leaves 2x2 patches or more"
            fits = size_px % patch_px == 0 and size_px >= 2 * patch_px
            require(fits, f"{prefix}masks.patch_px", patch_px, allowed)

    @property
    def slots_keep_transforms(self) -> bool:
        """Whether the two global slots have different transforms, so that every pair is (even view, odd view)."""
        return self.global_views.odd is not None
