"""Settings of the methods. Recipes and command lines read this file, so it imports no torch.

Defaults are the paper's ImageNet settings. The recipes name their sources.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hvp_ray.config import AtLeast0, AtLeast1, Fraction, MethodConfig, NonNegative, Positive


@dataclass(frozen=True, kw_only=True, slots=True)
class SimSiamConfig(MethodConfig):
    """SimSiam (Chen and He, CVPR 2021) with the heads of the HVP authors."""

    name: ClassVar[str] = "simsiam"
    implementation: ClassVar[str] = "hvp_ray.methods.simsiam:SimSiam"

    projector_layers: Literal[2, 3] = 3
    """Layers of the projector: 3 for ImageNet, 2 for CIFAR (SimSiam, appendix D)."""

    projector_dim: AtLeast1 = 2048
    """Output dimension of the projector."""

    projector_hidden_dim: AtLeast1 | None = None
    """Width of the projector's hidden layers. None: that of the encoder's features (the authors' code)."""

    predictor_hidden_dim: AtLeast1 = 512
    """Bottleneck of the predictor."""

    averaged_target: bool = False
    """With more than two views trained on (rule all_pairs), compare the prediction of each view with the mean of the other
    views' targets (FastSiam, Pototzky et al., 2022). False: mean over all pairs."""

    @property
    def trains_on_pairs(self) -> bool:
        """False with an averaged target."""
        return not self.averaged_target


@dataclass(frozen=True, kw_only=True, slots=True)
class SimCLRConfig(MethodConfig):
    """SimCLR (Chen et al., ICML 2020) with the head of the HVP authors."""

    name: ClassVar[str] = "simclr"
    implementation: ClassVar[str] = "hvp_ray.methods.simclr:SimCLR"
    contrasts_images: ClassVar[bool] = True

    projector_hidden_dim: AtLeast1 = 2048
    """Width of the projector's hidden layer."""

    projector_dim: AtLeast1 = 128
    """Output dimension of the projector."""

    temperature: Positive = 0.1
    """Temperature of the NT-Xent loss."""

    scoring_negatives: Literal["pair", "all"] = "pair"
    """Negatives that a pair is scored against; training does not use it. pair: the same two views of all other images (the
    authors). all: all candidate views of all other images, so that all pairs have the same negatives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig(MethodConfig):
    """DINO (Caron et al., ICCV 2021)."""

    name: ClassVar[str] = "dino"
    implementation: ClassVar[str] = "hvp_ray.methods.dino:Dino"
    uses_local_views: ClassVar[bool] = True

    num_prototypes: AtLeast1 = 65_536
    """Output dimension of the head."""

    head_hidden_dim: AtLeast1 = 2048
    """Width of the head's two hidden layers."""

    head_bottleneck_dim: AtLeast1 = 256
    """Width of the normalised bottleneck before the prototypes."""

    norm_last_layer: bool = True
    """The prototypes keep unit length. False: their lengths are trained (DINO's 800-epoch recipe)."""

    freeze_last_layer_epochs: AtLeast0 = 1
    """Number of first epochs in which the prototypes are not trained."""

    student_temperature: Positive = 0.1
    """Softmax temperature of the student."""

    teacher_temperature: Positive = 0.04
    """Softmax temperature of the teacher after its warm-up."""

    warmup_teacher_temperature: Positive = 0.04
    """Softmax temperature of the teacher at the start."""

    warmup_teacher_epochs: AtLeast0 = 0
    """Epochs of the teacher's warm-up, in which its temperature changes linearly by epoch."""

    teacher_momentum: Fraction = 0.996
    """Momentum of the teacher's weights at the start. It rises to 1 along a cosine by step."""

    center_momentum: Fraction = 0.9
    """Momentum of the centre of the teacher's outputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IBotConfig(DinoConfig):
    """iBOT (Zhou et al., ICLR 2022) with one head shared by the class token and the patches."""

    name: ClassVar[str] = "ibot"
    implementation: ClassVar[str] = "hvp_ray.methods.ibot:IBot"
    uses_masks: ClassVar[bool] = True

    num_prototypes: AtLeast1 = 8192
    """Output dimension of the shared head."""

    norm_last_layer: bool = False
    """The prototypes keep unit length. False: their lengths are trained."""

    patch_teacher_temperature: Positive = 0.07
    """Softmax temperature of the teacher's patches after the warm-up."""

    warmup_patch_teacher_temperature: Positive = 0.04
    """Softmax temperature of the teacher's patches at the start."""

    warmup_patch_teacher_epochs: AtLeast0 = 30
    """Epochs of warm-up of the teacher's patches, in which their temperature changes linearly by epoch."""

    patch_center_momentum: Fraction = 0.9
    """Momentum of the centre of the teacher's patch outputs."""

    class_weight: float = 1.0
    """Weight of the class token's loss (lambda 1)."""

    patch_weight: float = 1.0
    """Weight of the masked patches' loss (lambda 2)."""

    scoring: Literal["full", "class"] = "full"
    """Loss that a view is scored by. full: the whole loss, which prefers masked views (the authors). class: the class
    token's part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoV2Config(IBotConfig):
    """DINOv2 (Oquab et al., 2023): iBOT with separate heads, Sinkhorn-Knopp centring and KoLeo.

    The centres of DINO and iBOT do not exist, so `center_momentum` and `patch_center_momentum` have no effect.
    """

    name: ClassVar[str] = "dinov2"
    implementation: ClassVar[str] = "hvp_ray.methods.dinov2:DinoV2"

    num_prototypes: AtLeast1 = 65_536
    """Output dimension of the class token's head."""

    norm_last_layer: bool = True
    """The prototypes keep unit length. False: their lengths are trained."""

    teacher_temperature: Positive = 0.07
    """Softmax temperature of the teacher after its warm-up."""

    warmup_teacher_epochs: AtLeast0 = 30
    """Epochs of the teacher's warm-up, in which its temperature changes linearly by epoch."""

    teacher_momentum: Fraction = 0.992
    """Momentum of the teacher's weights at the start. It rises to 1 along a cosine by step."""

    num_patch_prototypes: AtLeast1 = 65_536
    """Output dimension of the patches' head."""

    patch_head_hidden_dim: AtLeast1 = 2048
    """Width of the two hidden layers of the patches' head."""

    patch_head_bottleneck_dim: AtLeast1 = 256
    """Width of the normalised bottleneck of the patches' head."""

    sinkhorn_iterations: AtLeast1 = 3
    """Alternations of Sinkhorn-Knopp."""

    koleo_weight: NonNegative = 0.1
    """Weight of KoLeo, which is summed over the two global views. 0: none."""
