"""DINO (Caron et al., ICCV 2021) with hard views.

Legend: G global views, L local views, S slots of global views, B images, K prototypes, D features.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvp_ray.methods import self_distillation as distillation
from hvp_ray.methods.backbones import build_backbone, feature_dim, patch_px
from hvp_ray.methods.configs import DinoConfig
from hvp_ray.methods.heads import PrototypeHead
from hvp_ray.methods.method import ALONE, Contrast, Method, MethodLoss, Ranks, StepPosition, ViewTensors
from hvp_ray.selection.candidates import Candidates, CandidateScores, Reusable
from hvp_ray.selection.view_outputs import ViewOutputs
from hvp_ray.selection.weights import PairWeighting


class Dino(Method):
    """Student and teacher, each encoder and head; the teacher has no gradient and no drop path."""

    center: Tensor
    teacher_temperature: Tensor

    def __init__(self, config: DinoConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self._config = config
        self.backbone = build_backbone(config.backbone)
        self.head = build_head(self.backbone, config)
        self.teacher_backbone = distillation.freeze(build_backbone(config.backbone, drop_path=0.0))
        self.teacher_backbone.load_state_dict(self.backbone.state_dict())
        self.teacher_head = distillation.frozen_copy(self.head)
        self.register_buffer("center", torch.zeros(config.num_prototypes))
        self.register_buffer("teacher_temperature", torch.tensor(self._temperature_at(epoch=0)), persistent=False)
        self._momentum = config.teacher_momentum
        self._prototypes_are_frozen = config.freeze_last_layer_epochs > 0

    @property
    def encoder(self) -> nn.Module:
        """The teacher's encoder, which DINO, section 3.1, finds better than the student's throughout training."""
        return self.teacher_backbone

    @property
    def encoders(self) -> list[nn.Module]:
        """The encoders of student and teacher."""
        return [self.backbone, self.teacher_backbone]

    @property
    def patch_px(self) -> int:
        """The patch size, which divides the size of every view."""
        return patch_px(self.backbone)

    def begin_step(self, position: StepPosition) -> None:
        """Set the teacher's temperature and momentum, and whether the prototypes are trained."""
        config = self._config
        self.teacher_temperature.fill_(self._temperature_at(position.epoch))
        self._momentum = distillation.teacher_momentum_at(config.teacher_momentum, position.step, position.num_steps)
        self._prototypes_are_frozen = position.epoch < config.freeze_last_layer_epochs

    def embed(self, views: ViewTensors) -> ViewOutputs:
        """Forward the teacher on the global views and the student on all; keep centre and teacher unchanged."""
        teacher_bottleneck = self._teacher_bottleneck(views)
        features, kept = self.encode_views(views)
        of_globals, of_locals = self.head(features).tensor_split([len(views.global_views)])
        return ViewOutputs(
            of_globals={"bottleneck": of_globals, "teacher_bottleneck": teacher_bottleneck},
            of_locals={"bottleneck": of_locals},
            kept=kept,
        )

    def compare(self, outputs: ViewOutputs, candidates: Candidates) -> CandidateScores:
        """Score all (pair of global views, local views) by their cross-entropies."""
        teacher_bottleneck = outputs.of_globals["teacher_bottleneck"]
        targets_GBK = self._probabilities(self.teacher_head.logits(teacher_bottleneck))
        logits = self.head.logits_by_view(outputs.of_all_views("bottleneck"))
        crosses = distillation.cross_entropies(targets_GBK, logits, self._config.student_temperature)
        return replace(
            distillation.score_tuples(crosses, candidates),
            reusable=self._reusable(teacher_bottleneck=teacher_bottleneck) | outputs.kept,
        )

    def forward(
        self, views: ViewTensors, contrast: Contrast | None = None, weigh: PairWeighting | None = None
    ) -> MethodLoss:
        """Return the mean cross-entropy over all (teacher's global view, other view of the student).

        With more than two global views this is the mean over their pairs of the vanilla loss, each pair with all local
        views (`self_distillation.losses_of_pairs`).
        """
        with torch.no_grad():
            teacher_logits = self.teacher_head.logits(self._teacher_bottleneck(views))
            targets_SBK = self._probabilities(teacher_logits)
        features, _ = self.encode_views(views)
        logits = self.head.logits(self.head(features))
        crosses = distillation.cross_entropies(targets_SBK, logits, self._config.student_temperature)
        common: dict[str, Any] = {
            "embeddings": features[0].detach(),
            "statistics": {"center": teacher_logits.mean(dim=(0, 1))},
            "measurements": distillation.teacher_measurements(targets_SBK),
        }
        if len(targets_SBK) == 2:
            return MethodLoss(loss=distillation.mean_of_cross_views(crosses), **common)
        losses_BP = distillation.losses_of_pairs(crosses, views.as_candidates())
        return MethodLoss.of_pairs(losses_BP, weigh, **common)

    def before_update(self) -> None:
        """Drop the gradients of the prototypes in the first epochs. Source: facebookresearch/dino utils.py."""
        if self._prototypes_are_frozen:
            for parameter in self.head.prototypes.parameters():
                parameter.grad = None

    def after_update(self, statistics: dict[str, Tensor]) -> None:
        """Move the teacher towards the student, and the centre towards the teacher's mean output."""
        distillation.update_teacher(self.backbone, self.teacher_backbone, self._momentum)
        distillation.update_teacher(self.head, self.teacher_head, self._momentum)
        self.center.lerp_(statistics["center"], 1.0 - self._config.center_momentum)

    def _temperature_at(self, epoch: int) -> float:
        config = self._config
        return distillation.temperature_at(
            config.warmup_teacher_temperature, config.teacher_temperature, config.warmup_teacher_epochs, epoch
        )

    def _teacher_bottleneck(self, views: ViewTensors) -> Float[Tensor, "views batch bottleneck"]:
        """Return the teacher's output before the prototypes, computed by scoring or now."""
        if "teacher_bottleneck" in views.reusable:
            return views.reusable["teacher_bottleneck"]
        images = views.global_views
        bottleneck: Tensor = self.teacher_head(
            self.teacher_backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        )
        return bottleneck

    def _reusable(self, **of_teacher: Tensor) -> Reusable:
        """Return the teacher's outputs, unless they depend on the other images of the batch."""
        modules = (*self.teacher_backbone.modules(), *self.teacher_head.modules())
        return {} if any(isinstance(module, _BatchNorm) for module in modules) else dict(of_teacher)

    def _probabilities(self, logits: Tensor) -> Float[Tensor, "views batch prototypes"]:
        return distillation.teacher_probabilities(logits, self.center, self.teacher_temperature)


def build_head(backbone: nn.Module, config: DinoConfig) -> PrototypeHead:
    """Build the head that fits the encoder."""
    return PrototypeHead(
        feature_dim(backbone),
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
        num_prototypes=config.num_prototypes,
        norm_last_layer=config.norm_last_layer,
    )
