"""SimSiam (Chen and He, CVPR 2021) with hard views.

Legend: V views, B images, P pairs, D dimension of projections.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from hvp_ray.errors import ShapeError
from hvp_ray.methods.backbones import build_backbone, feature_dim
from hvp_ray.methods.configs import SimSiamConfig
from hvp_ray.methods.heads import simsiam_predictor, simsiam_projector
from hvp_ray.methods.method import ALONE, Contrast, Method, MethodLoss, Ranks, ViewTensors, in_float32
from hvp_ray.selection.candidates import Candidates, CandidateScores
from hvp_ray.selection.view_outputs import ViewOutputs
from hvp_ray.selection.weights import PairWeighting


class SimSiam(Method):
    """Encoder, projector and predictor."""

    def __init__(self, config: SimSiamConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone)
        dim = feature_dim(self.backbone)
        hidden_dim = config.projector_hidden_dim or dim
        self.projector = simsiam_projector(dim, hidden_dim, config.projector_dim, config.projector_layers)
        self.predictor = simsiam_predictor(config.projector_dim, config.predictor_hidden_dim)
        self._averaged_target = config.averaged_target

    def embed(self, views: ViewTensors) -> ViewOutputs:
        """Forward all views as one batch (one set of BatchNorm statistics, as the authors do)."""
        features, kept = self.encode_views(views)
        projections = self.projector(features.flatten(0, 1))
        of_views = {"projections": projections, "predictions": self.predictor(projections)}
        shape = (*features.shape[:2], -1)
        return ViewOutputs(
            of_globals={name: values.reshape(shape).float() for name, values in of_views.items()}, kept=kept
        )

    def compare(self, outputs: ViewOutputs, candidates: Candidates) -> CandidateScores:
        """Score all pairs."""
        projections, predictions = outputs.of_globals["projections"], outputs.of_globals["predictions"]
        pairs = candidates.pairs_on(projections.device)
        return CandidateScores(pairs_BP=score_pairs(projections, predictions, pairs), reusable=outputs.kept)

    def forward(
        self, views: ViewTensors, contrast: Contrast | None = None, weigh: PairWeighting | None = None
    ) -> MethodLoss:
        """Forward each slot by itself (own BatchNorm statistics) and average the loss over all pairs of slots.

        Two slots are vanilla SimSiam: loss = -(mean cos(p1, z2) + mean cos(p2, z1)) / 2, z without gradient. More slots with
        `averaged_target` are FastSiam.
        """
        slots = views.global_views
        kept = views.reusable.get("student_global")
        features = [self.backbone(slot) for slot in slots] if kept is None else kept
        projections = [self.projector(of_slot) for of_slot in features]
        predictions = [self.predictor(projection).float() for projection in projections]
        targets = [projection.detach().float() for projection in projections]
        if len(slots) == 2:
            forward, backward = (F.cosine_similarity(predictions[m], targets[1 - m]).mean() for m in (0, 1))
            return MethodLoss(loss=-(forward + backward) / 2, embeddings=targets[0])
        candidates = views.as_candidates()
        targets_SBD, predictions_SBD = torch.stack(targets), torch.stack(predictions)
        if self._averaged_target:
            loss = averaged_target_loss(targets_SBD, predictions_SBD, candidates)
            return MethodLoss(loss=loss, embeddings=targets[0])
        losses_BP = score_pairs(targets_SBD, predictions_SBD, candidates.pairs_on(targets_SBD.device))
        return MethodLoss.of_pairs(losses_BP, weigh, embeddings=targets[0])

    def constant_rate_parameters(self) -> list[nn.Parameter]:
        """The predictor (SimSiam, section 4.2: it works best with a constant learning rate)."""
        return list(self.predictor.parameters())


@in_float32
def score_pairs(
    projections_VBD: Float[Tensor, "views batch dim"],
    predictions_VBD: Float[Tensor, "views batch dim"],
    pairs: Int64[Tensor, "pairs 2"],
) -> Float[Tensor, "batch pairs"]:
    """Score pairs of views by the SimSiam loss they would give; higher is harder.

    score(m, n) = -(cos(p_m, z_n) + cos(p_n, z_m)) / 2, in [-1, 1].

    Raises:
        ShapeError: shapes that differ.

    Source: Ferreira et al., ICLR 2025; automl/hvp select_crops.py:10-38.
    Differs: all pairs at once instead of a running minimum of the similarity, so ties go to the lowest pair.
    """
    if projections_VBD.shape != predictions_VBD.shape:
        raise ShapeError(f"projections {projections_VBD.shape} and predictions {predictions_VBD.shape} differ in shape")
    targets, predicted = F.normalize(projections_VBD, dim=-1), F.normalize(predictions_VBD, dim=-1)
    first, second = pairs[:, 0], pairs[:, 1]
    forward = (predicted[first] * targets[second]).sum(dim=-1)
    backward = (predicted[second] * targets[first]).sum(dim=-1)
    return (-(forward + backward) / 2).T


@in_float32
def averaged_target_loss(
    targets_SBD: Float[Tensor, "slots batch dim"],
    predictions_SBD: Float[Tensor, "slots batch dim"],
    candidates: Candidates,
) -> Float[Tensor, ""]:
    """Return FastSiam's loss: -cos(p_m, mean of z_n over the views n that m makes a pair with), mean over views and images.

    Source: Pototzky et al., 2022 (FastSiam), section 3: the mean of the projections, not of their directions.
    """
    losses = []
    for view in range(len(targets_SBD)):
        others = [targets_SBD[m + n - view] for m, n in candidates.pairs.tolist() if view in (m, n)]
        losses.append(-F.cosine_similarity(predictions_SBD[view], torch.stack(others).mean(dim=0)).mean())
    return torch.stack(losses).mean()
