"""BYOL (Grill et al., NeurIPS 2020) with hard views, as anyone would add it: method, settings and recipe in one file.

PYTHONPATH=docs/examples python pipelines/pretrain.py byol:byol_digits
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hvp_ray.config import AtLeast1, Fraction, MethodConfig, RunConfig
from hvp_ray.methods.backbones import build_backbone, feature_dim
from hvp_ray.methods.method import ALONE, Contrast, Method, MethodLoss, Ranks, StepPosition, ViewTensors
from hvp_ray.methods.self_distillation import frozen_copy, teacher_momentum_at, update_teacher
from hvp_ray.methods.simsiam import score_pairs
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import Candidates, CandidateScores, PairWeighting, ViewOutputs


@dataclass(frozen=True, kw_only=True, slots=True)
class ByolConfig(MethodConfig):
    """Settings of BYOL."""

    name: ClassVar[str] = "byol"
    implementation: ClassVar[str] = "byol:Byol"

    hidden_dim: AtLeast1 = 4096
    """Width of the hidden layers of projector and predictor."""

    projector_dim: AtLeast1 = 256
    """Output dimension of projector and predictor."""

    teacher_momentum: Fraction = 0.996
    """Momentum of the target network at the start; rises to 1 along a cosine."""


class Byol(Method):
    """Online network with a predictor, and a target network that follows it."""

    def __init__(self, config: ByolConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self._config = config
        self.backbone = build_backbone(config.backbone)
        self.projector = _mlp(feature_dim(self.backbone), config.hidden_dim, config.projector_dim)
        self.predictor = _mlp(config.projector_dim, config.hidden_dim, config.projector_dim)
        self.target_backbone = frozen_copy(self.backbone)
        self.target_projector = frozen_copy(self.projector)
        self._momentum = config.teacher_momentum

    @property
    def encoders(self) -> list[nn.Module]:
        """Initial weights go into both."""
        return [self.backbone, self.target_backbone]

    def begin_step(self, position: StepPosition) -> None:
        """Set the momentum of this step."""
        self._momentum = teacher_momentum_at(self._config.teacher_momentum, position.step, position.num_steps)

    def embed(self, views: ViewTensors) -> ViewOutputs:
        """Forward every view once through both networks."""
        targets, predictions = self._both(views)
        return ViewOutputs(of_globals={"targets": targets, "predictions": predictions})

    def compare(self, outputs: ViewOutputs, candidates: Candidates) -> CandidateScores:
        """Score all pairs from the embeddings."""
        of_views = outputs.of_globals
        return CandidateScores(pairs_BP=_losses(of_views["targets"], of_views["predictions"], candidates))

    def forward(
        self, views: ViewTensors, contrast: Contrast | None = None, weigh: PairWeighting | None = None
    ) -> MethodLoss:
        """BYOL's symmetric loss, -(cos(p1, z2) + cos(p2, z1)) / 2, mean over images (and over pairs of slots)."""
        targets, predictions = self._both(views)
        losses_BP = _losses(targets, predictions, views.as_candidates())
        return MethodLoss.of_pairs(losses_BP, weigh, embeddings=predictions[0].detach())

    def after_update(self, statistics: dict[str, Tensor]) -> None:
        """Move the target network."""
        update_teacher(self.backbone, self.target_backbone, self._momentum)
        update_teacher(self.projector, self.target_projector, self._momentum)

    def _both(self, views: ViewTensors) -> tuple[Tensor, Tensor]:
        """Return what is predicted and the predictions, both [V, B, D]."""
        images, shape = views.global_views.flatten(0, 1), (*views.global_views.shape[:2], -1)
        predictions = self.predictor(self.projector(self.backbone(images)))
        with torch.no_grad():
            targets = self.target_projector(self.target_backbone(images))
        return targets.float().reshape(shape), predictions.float().reshape(shape)


def _losses(targets: Tensor, predictions: Tensor, candidates: Candidates) -> Tensor:
    """Loss of each pair: SimSiam's formula, with the target network's outputs in the place of the stopped gradient."""
    return score_pairs(targets, predictions, candidates.pairs_on(targets.device))


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim)
    )


def byol_digits() -> RunConfig:
    """Return SimSiam's smoke test with BYOL in its place."""
    recipe = get_recipe("simsiam-digits")
    method = ByolConfig(backbone=recipe.method.backbone, hidden_dim=128, projector_dim=64, teacher_momentum=0.98)
    return dataclasses.replace(recipe, recipe="byol-digits", method=method)
