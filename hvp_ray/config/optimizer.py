"""Optimizer and schedules."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from hvp_ray.config.checks import Checked, NonNegative, Positive, Range, require


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Checked):
    """Optimizer and schedules. Every schedule is a function of the step."""

    path: ClassVar[str] = "optimizer"

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """sgd and adamw are torch's. lars is timm's, in one of two forms (`lars_norm`)."""

    learning_rate_per_256: Positive
    """Base learning rate, for 256 images per step. The rate used is this x images_per_step / 256."""

    momentum: Annotated[float, Range(least=0, below=1)] = 0.9
    """Momentum of sgd and lars. adamw has betas of 0.9 and 0.999."""

    weight_decay: NonNegative = 1e-4
    """Weight decay at the start of the run."""

    final_weight_decay: NonNegative | None = None
    """Weight decay at the end of the run, reached along a cosine by step (DINO). None: it stays constant."""

    decay_exempts_vectors: bool = False
    """Biases and other one-dimensional parameters have no weight decay and no LARS adaptation."""

    lars_trust_coefficient: Positive = 0.001
    """lars: the rate of a tensor is scaled by this x its norm / the norm of its gradient (`lars_norm`)."""

    lars_norm: Literal["decayed-gradient", "separate"] = "decayed-gradient"
    """lars: the divisor, with tensor w, gradient g and weight decay d. decayed-gradient: |g + d w| (the HVP authors, MoCo
    v3). separate: |g| + d |w| (solo-learn, timm, apex)."""

    lars_clip: bool = False
    """lars: the scaled rate of a tensor is at most the learning rate (LARC)."""

    schedule: Literal["cosine-per-epoch", "cosine-per-step"] = "cosine-per-epoch"
    """How often the cosine of the learning rate is evaluated (SimSiam: once per epoch)."""

    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up from 0, by step; the cosine spans the rest. A shorter run is all warm-up."""

    final_learning_rate: NonNegative = 0.0
    """Learning rate at the end of the cosine, not scaled by the images per step."""

    constant_predictor_rate: bool = True
    """Parameters that the method names (SimSiam's predictor) keep the initial learning rate (SimSiam, section 4.2)."""

    layer_decay: Annotated[float, Range(above=0, most=1)] = 1.0
    """Layer-wise decay of the learning rate: each layer of the encoder has this times the rate of the next one. Below 1,
    early layers change less, which keeps more of `training.initial_weights` (0.65 to 0.9 is usual)."""

    patch_embedding_rate: Positive = 1.0
    """Factor of the learning rate of a Vision Transformer's patch embedding, beside `layer_decay` (DINOv2: 0.2)."""

    fused: bool = False
    """sgd and adamw: torch's fused kernels, which read and write each tensor once. They round differently."""

    clip_gradient_norm: Positive | None = None
    """Largest norm of the gradient. None: no clipping (SimSiam)."""

    clip_scope: Literal["global", "tensor"] = "global"
    """Norm that is clipped. global: that of all parameters. tensor: each parameter's own (DINO's and iBOT's code)."""

    def check_together(self, prefix: str) -> None:
        """Check that a warm-up has a schedule by step, and that there are fused kernels."""
        fits = self.schedule == "cosine-per-step" or self.warmup_epochs == 0.0
        allowed = f"0 with {prefix}schedule=cosine-per-epoch"
        require(fits, f"{prefix}warmup_epochs", self.warmup_epochs, allowed)
        require(not (self.fused and self.name == "lars"), f"{prefix}fused", self.fused, f"False with {prefix}name=lars")
