"""Settings of the four methods of the paper. No torch here: recipes and command lines read this file.

Defaults are those of ImageNet at the paper's settings; see the recipes for where they come from.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hvp_ray.config import MethodConfig
from hvp_ray.errors import ConfigError


def _require_positive(config: MethodConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"method.{name}={getattr(config, name)!r} is not allowed: it must be positive")


def _require_fraction(config: MethodConfig, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ConfigError(f"method.{name}={getattr(config, name)!r} is not allowed: 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimSiamConfig(MethodConfig):
    """SimSiam (Chen and He, CVPR 2021) with the heads of the HVP authors."""

    name: ClassVar[str] = "simsiam"
    implementation: ClassVar[str] = "hvp_ray.methods.simsiam:SimSiam"

    projector_layers: Literal[2, 3] = 3
    """3 for ImageNet, 2 for CIFAR nets (SimSiam, appendix D)."""

    projector_dim: int = 2048
    """Output dimension of the projector."""

    projector_hidden_dim: int | None = None
    """Width of the projector's hidden layers. None: that of the encoder's features, as in the authors' code."""

    predictor_hidden_dim: int = 512
    """Bottleneck of the predictor."""

    def __post_init__(self) -> None:
        _require_positive(self, "projector_dim", "predictor_hidden_dim")
        if self.projector_hidden_dim is not None:
            _require_positive(self, "projector_hidden_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimCLRConfig(MethodConfig):
    """SimCLR (Chen et al., ICML 2020) with the head of the HVP authors."""

    name: ClassVar[str] = "simclr"
    implementation: ClassVar[str] = "hvp_ray.methods.simclr:SimCLR"

    projector_hidden_dim: int = 2048
    """Width of the projector's hidden layer."""

    projector_dim: int = 128
    """Output dimension of the projector."""

    temperature: float = 0.1
    """Temperature of the NT-Xent loss."""

    scoring_negatives: Literal["pair", "all"] = "pair"
    """What a pair is scored against. pair: the same two views of all other images, as the authors do. all: all
    candidate views of all other images, so that all pairs meet the same negatives. Training is not touched."""

    def __post_init__(self) -> None:
        _require_positive(self, "projector_hidden_dim", "projector_dim", "temperature")


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig(MethodConfig):
    """DINO (Caron et al., ICCV 2021)."""

    name: ClassVar[str] = "dino"
    implementation: ClassVar[str] = "hvp_ray.methods.dino:Dino"
    uses_local_views: ClassVar[bool] = True

    num_prototypes: int = 65_536
    """Output dimension of the head."""

    head_hidden_dim: int = 2048
    """Width of the head's two hidden layers."""

    head_bottleneck_dim: int = 256
    """Width of the normalised bottleneck before the prototypes."""

    norm_last_layer: bool = True
    """The prototypes keep unit length; False: their lengths are trained (DINO's 800-epoch recipe)."""

    freeze_last_layer_epochs: int = 1
    """The prototypes are not trained in the first epochs."""

    student_temperature: float = 0.1
    """Softmax temperature of the student."""

    teacher_temperature: float = 0.04
    """Softmax temperature of the teacher after its warm-up."""

    warmup_teacher_temperature: float = 0.04
    """Softmax temperature of the teacher at the start."""

    warmup_teacher_epochs: int = 0
    """Epochs over which the teacher's temperature moves, linearly by epoch."""

    teacher_momentum: float = 0.996
    """Momentum of the teacher's weights at the start; rises to 1 along a cosine by step."""

    center_momentum: float = 0.9
    """Momentum of the centre of the teacher's outputs."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_prototypes", "head_hidden_dim", "head_bottleneck_dim", "student_temperature")
        _require_positive(self, "teacher_temperature", "warmup_teacher_temperature")
        _require_fraction(self, "teacher_momentum", "center_momentum")


@dataclass(frozen=True, kw_only=True, slots=True)
class IBotConfig(DinoConfig):
    """iBOT (Zhou et al., ICLR 2022) with one head shared by the class token and the patches."""

    name: ClassVar[str] = "ibot"
    implementation: ClassVar[str] = "hvp_ray.methods.ibot:IBot"
    uses_masks: ClassVar[bool] = True

    num_prototypes: int = 8192
    """Output dimension of the shared head."""

    norm_last_layer: bool = False
    """The prototypes keep unit length; False: their lengths are trained."""

    patch_teacher_temperature: float = 0.07
    """Softmax temperature of the teacher's patches after their warm-up."""

    warmup_patch_teacher_temperature: float = 0.04
    """Softmax temperature of the teacher's patches at the start."""

    warmup_patch_teacher_epochs: int = 30
    """Epochs over which the temperature of the teacher's patches moves."""

    patch_center_momentum: float = 0.9
    """Momentum of the centre of the teacher's patch outputs."""

    class_weight: float = 1.0
    """Weight of the class token's loss (lambda 1)."""

    patch_weight: float = 1.0
    """Weight of the masked patches' loss (lambda 2)."""

    scoring: Literal["full", "class"] = "full"
    """What a view is scored by. full: the whole loss, as the authors do, which prefers masked views. class: the class
    token's part only."""

    def __post_init__(self) -> None:
        DinoConfig.__post_init__(self)
        _require_positive(self, "patch_teacher_temperature", "warmup_patch_teacher_temperature")
        _require_fraction(self, "patch_center_momentum")
