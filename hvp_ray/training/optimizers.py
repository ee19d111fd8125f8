"""The optimizer of a method, with parameter groups by learning rate schedule and weight decay."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay
from torch import nn

from hvp_ray.config import OptimizerConfig
from hvp_ray.distributed.shard import own_part, whole
from hvp_ray.errors import ConfigError
from hvp_ray.methods.method import Method
from hvp_ray.training.schedules import base_learning_rate

_SCHEDULED, _DECAYS, _SCALE = "follows_schedule", "decays", "rate_scale"
"""Keys of a parameter group."""


def build_optimizer(method: Method, config: OptimizerConfig, *, images_per_step: int) -> torch.optim.Optimizer:
    """Build SGD, LARS or AdamW for the trained parameters of a method; a teacher's are not trained.

    With `constant_predictor_rate`, the parameters that the method names keep the initial learning rate. With
    `decay_exempts_vectors`, biases and norms do not decay. With `layer_decay`, layers of the encoder have rates of their own,
    and with `patch_embedding_rate` the patch embedding.

    Raises:
        ConfigError: the encoder has no patch embedding.
    """
    scale_of = _rate_scales(method, config)
    constant = {id(p) for p in method.constant_rate_parameters()} if config.constant_predictor_rate else set()
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in method.parameters():
        if parameter.requires_grad:
            decays = not (config.decay_exempts_vectors and parameter.ndim <= 1)
            key = id(parameter) not in constant, decays, scale_of.get(id(parameter), 1.0)
            groups.setdefault(key, []).append(parameter)
    rate = base_learning_rate(config, images_per_step)
    described: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": scale * rate,
            _SCHEDULED: scheduled,
            _DECAYS: decays,
            _SCALE: scale,
        }
        for (scheduled, decays, scale), parameters in groups.items()
    ]
    match config.name:
        case "sgd":
            return torch.optim.SGD(described, lr=rate, momentum=config.momentum, fused=config.fused or None)
        case "lars":
            for group in described:
                group["always_adapt"] = group[_DECAYS]  # parameters without decay are not adapted either
            form = Lars if config.lars_norm == "separate" else _LarsOfDecayedGradient
            lars: torch.optim.Optimizer = form(
                described,
                lr=rate,
                momentum=config.momentum,
                trust_coeff=config.lars_trust_coefficient,
                trust_clip=config.lars_clip,
            )
            return lars
        case "adamw":
            return torch.optim.AdamW(described, lr=rate, fused=config.fused or None)


def _rate_scales(method: Method, config: OptimizerConfig) -> dict[int, float]:
    """Return the factor of the rate for parameters of the encoder, by identity: layer_decay ** (layers above it).

    Source: BEiT and MAE; the layers are timm's. The patch embedding's own factor: facebookresearch/dinov2,
    utils/param_groups.py.
    """
    scales: dict[int, float] = {}
    if config.layer_decay != 1.0:
        groups = param_groups_layer_decay(method.backbone, layer_decay=config.layer_decay)
        scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    if config.patch_embedding_rate != 1.0:
        if not isinstance(method.backbone, VisionTransformer):
            raise ConfigError(
                f"optimizer.patch_embedding_rate={config.patch_embedding_rate:g} is not allowed: the encoder is no Vision "
                f"Transformer, so it has no patch embedding; leave it at 1"
            )
        for parameter in method.backbone.patch_embed.parameters():
            scales[id(parameter)] = scales.get(id(parameter), 1.0) * config.patch_embedding_rate
    return scales


class _LarsOfDecayedGradient(Lars):
    """LARS that divides by |g + d w|: it adds the decay to the gradient and runs timm's LARS without decay.

    Source: automl/hvp, branch simclr, optimizers/lars.py, which equals MoCo v3's. Differs: timm adds 1e-8 to the norm.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights; the gradients change too, so a closure cannot recompute them."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if decay and trained:
                torch._foreach_add_([parameter.grad for parameter in trained], trained, alpha=decay)
            group["weight_decay"] = 0.0
        try:
            super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def set_schedule(optimizer: torch.optim.Optimizer, *, learning_rate: float, weight_decay: float) -> None:
    """Set the learning rate of the scheduled groups and the weight decay of the decaying ones."""
    for group in optimizer.param_groups:
        if group[_SCHEDULED]:
            group["lr"] = learning_rate * group[_SCALE]
        if group[_DECAYS]:
            group["weight_decay"] = weight_decay


def clip_gradients(method: nn.Module, config: OptimizerConfig) -> torch.Tensor | None:
    """Clip as configured; return the global norm before clipping, or None if clipping is off.

    Source: global as automl/hvp (branch dino); tensor as facebookresearch/dino utils.py:132-141 and bytedance/ibot.
    """
    if config.clip_gradient_norm is None:
        return None
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    if config.clip_scope == "global":
        norm: torch.Tensor = whole(nn.utils.clip_grad_norm_(method.parameters(), config.clip_gradient_norm))
        return norm
    norms = [whole(norm) for norm in torch._foreach_norm(gradients)]
    factors = [(config.clip_gradient_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
    torch._foreach_mul_([own_part(gradient) for gradient in gradients], factors)
    return torch.stack(norms).norm()
