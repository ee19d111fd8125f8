"""DINOv2 (Oquab et al., 2023) with hard views: iBOT with a head for patches, Sinkhorn-Knopp centring, and KoLeo.

A score is the loss that a candidate would give, as in iBOT. Two parts of it depend on the batch, and so on views that are
not trained on. The targets of all candidate views are balanced together, and a view's KoLeo is its distance to the same
view of other images. With two views, both are what training computes.

Legend: V global views, B images, M patches that may be masked, K prototypes, D features.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from hvp_ray.methods import self_distillation as distillation
from hvp_ray.methods.backbones import feature_dim
from hvp_ray.methods.configs import DinoV2Config
from hvp_ray.methods.heads import PrototypeHead
from hvp_ray.methods.ibot import IBot
from hvp_ray.methods.koleo import nearest_neighbour_losses
from hvp_ray.methods.method import ALONE, Ranks
from hvp_ray.methods.sinkhorn_knopp import balanced_probabilities


class DinoV2(IBot):
    """iBOT's student and teacher; register tokens and LayerScale are those of the network."""

    def __init__(self, config: DinoV2Config, ranks: Ranks = ALONE) -> None:
        super().__init__(config, ranks)
        self._dinov2, self._ranks = config, ranks
        del self.center, self.patch_center  # the batch is balanced instead
        self.patch_head = PrototypeHead(
            feature_dim(self.backbone),
            hidden_dim=config.patch_head_hidden_dim,
            bottleneck_dim=config.patch_head_bottleneck_dim,
            num_prototypes=config.num_patch_prototypes,
            norm_last_layer=config.norm_last_layer,
        )
        self.teacher_patch_head = distillation.frozen_copy(self.patch_head)

    def heads_of_patches(self) -> tuple[PrototypeHead, PrototypeHead]:
        """Return heads of their own."""
        return self.patch_head, self.teacher_patch_head

    def losses_of_views(
        self,
        of_teacher: Float[Tensor, "views batch masked bottleneck"],
        *,
        tokens: Float[Tensor, "views batch dim"],
        patches: Float[Tensor, "views batch masked bottleneck"],
        weights: Float[Tensor, "views batch masked"],
        measurements: dict[str, Tensor] | None = None,
    ) -> dict[str, Float[Tensor, "batch views"]]:
        """Return the patch loss and KoLeo."""
        parts = super().losses_of_views(
            of_teacher, tokens=tokens, patches=patches, weights=weights, measurements=measurements
        )
        if self._dinov2.koleo_weight:
            ranks = self._ranks
            parts["koleo"] = nearest_neighbour_losses(tokens, gather=ranks.gather, rank=ranks.rank)
        return parts

    @torch.no_grad()
    def patch_targets(
        self,
        of_teacher: Float[Tensor, "views batch masked bottleneck"],
        weights: Float[Tensor, "views batch masked"],
    ) -> Iterable[Float[Tensor, "batch masked prototypes"]]:
        """Return the probabilities, balanced over the masked patches of all views."""
        logits = self.teacher_patch_head.logits(of_teacher)
        return self._balanced(logits, self.patch_teacher_temperature, counts=weights > 0.0)

    def weights_of_parts(self) -> dict[str, float]:
        """Return the weight of each part; KoLeo is a sum over the two views, and the other parts are means."""
        return super().weights_of_parts() | {"koleo": 2.0 * self._dinov2.koleo_weight}

    def statistics(
        self,
        class_logits: Float[Tensor, "views batch prototypes"],
        patch_bottleneck_mean: Float[Tensor, "views batch patch_bottleneck"],
    ) -> dict[str, Tensor]:
        """Return nothing: there are no centres."""
        return {}

    def before_update(self) -> None:
        """Drop the gradients of both heads' prototypes in the first epochs."""
        super().before_update()
        if self._prototypes_are_frozen:
            for parameter in self.patch_head.prototypes.parameters():
                parameter.grad = None

    def after_update(self, statistics: dict[str, Tensor]) -> None:
        """Move the teacher towards the student."""
        distillation.update_teacher(self.backbone, self.teacher_backbone, self._momentum)
        distillation.update_teacher(self.head, self.teacher_head, self._momentum)
        distillation.update_teacher(self.patch_head, self.teacher_patch_head, self._momentum)

    def _probabilities(self, logits: Tensor) -> Float[Tensor, "views batch prototypes"]:
        return self._balanced(logits, self.teacher_temperature)

    def _balanced(self, logits: Tensor, temperature: Tensor, *, counts: Tensor | None = None) -> Tensor:
        balanced = balanced_probabilities(
            logits.flatten(0, -2),
            temperature,
            gather=self._ranks.gather,
            counts_N=None if counts is None else counts.flatten(),
            iterations=self._dinov2.sinkhorn_iterations,
        )
        return balanced.view(logits.shape)
