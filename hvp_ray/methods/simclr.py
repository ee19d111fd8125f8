"""SimCLR (Chen et al., ICML 2020) with hard views.

Legend: V views, S slots trained on, B images on this rank, N images on all ranks, R ranks, P pairs, D dimension of
projections.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from hvp_ray.methods.backbones import build_backbone, feature_dim
from hvp_ray.methods.configs import SimCLRConfig
from hvp_ray.methods.heads import simclr_projector
from hvp_ray.methods.method import ALONE, Contrast, Method, MethodLoss, Ranks, ViewTensors, in_float32
from hvp_ray.selection.candidates import Candidates, CandidateScores, Reusable
from hvp_ray.selection.view_outputs import ViewOutputs
from hvp_ray.selection.weights import PairWeighting


class SimCLR(Method):
    """Encoder and projector; negatives are the views of all other images of all ranks."""

    def __init__(self, config: SimCLRConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone)
        dim = feature_dim(self.backbone)
        self.projector = simclr_projector(dim, config.projector_hidden_dim, config.projector_dim)
        self._temperature = config.temperature
        self._negatives_of_all_views = config.scoring_negatives == "all"
        self._ranks = ranks

    def embed(self, views: ViewTensors) -> ViewOutputs:
        """Forward all views as one batch."""
        projections, kept = self._project(views)
        return ViewOutputs(of_globals={"projections": projections}, kept=kept)

    def compare(self, outputs: ViewOutputs, candidates: Candidates) -> CandidateScores:
        """Gather the projections over the ranks once, and score all pairs."""
        own_VBD, first_round = outputs.of_globals["projections"], None
        if outputs.first_round is not None:
            of_first_SBD = outputs.first_round.outputs.of_globals["projections"]
            positions = self._ranks.rank * of_first_SBD.shape[1] + outputs.first_round.images
            first_round = _join_ranks(self._ranks.gather(of_first_SBD)), positions
        return CandidateScores(
            reusable=outputs.kept,
            pairs_BP=score_pairs(
                own_VBD,
                _join_ranks(self._ranks.gather(own_VBD)),
                candidates.pairs_on(own_VBD.device),
                first_image=self._ranks.rank * own_VBD.shape[1],
                temperature=self._temperature,
                negatives_of_all_views=self._negatives_of_all_views,
                first_round=first_round,
            ),
        )

    def forward(
        self, views: ViewTensors, contrast: Contrast | None = None, weigh: PairWeighting | None = None
    ) -> MethodLoss:
        """Forward the slots as one batch; NT-Xent over all images of the step.

        With more than two slots, mean over all pairs: the negatives of every pair are all slots of the other images, and
        never a slot of this image. With `contrast`, the value is the loss of the whole step on this rank, and the gradient
        is scaled so that the mean over the parts is the gradient of the whole step.
        """
        own_SBD, _ = self._project(views)
        everything_SND = _join_ranks(self._ranks.gather(own_SBD))
        candidates, first_image = views.as_candidates(), self._ranks.rank * own_SBD.shape[1]
        if contrast is None:
            return self._contrast(own_SBD, everything_SND, first_image, candidates, weigh)
        num_parts, part = contrast.features.shape[0], contrast.part
        rows, columns = [], []
        for other in range(num_parts):
            if other == part:
                rows.append(own_SBD)
                columns.append(everything_SND)
            else:
                rows.append(contrast.features[other])
                columns.append(_join_ranks(self._ranks.gather(contrast.features[other])))
        images_of_part = everything_SND.shape[1]
        whole_SND = torch.cat(columns, dim=1)
        of_parts = [
            self._contrast(row, whole_SND, other * images_of_part + first_image, candidates, weigh)
            for other, row in enumerate(rows)
        ]
        loss = torch.stack([of_part.loss for of_part in of_parts]).mean()
        return replace(of_parts[part], loss=num_parts * loss - (num_parts - 1) * loss.detach())

    def _contrast(
        self,
        own_SBD: Float[Tensor, "slots batch dim"],
        everything_SND: Float[Tensor, "slots images dim"],
        first_image: int,
        candidates: Candidates,
        weigh: PairWeighting | None,
    ) -> MethodLoss:
        """Return the loss of these images' slots among all images of the step, of which the first is `first_image`."""
        embeddings = own_SBD[0].detach()
        if len(own_SBD) == 2:
            loss = nt_xent(own_SBD, everything_SND, first_image=first_image, temperature=self._temperature)
            return MethodLoss(loss=loss, embeddings=embeddings)
        losses_BP = score_pairs(
            own_SBD,
            everything_SND,
            candidates.pairs_on(own_SBD.device),
            first_image=first_image,
            temperature=self._temperature,
            negatives_of_all_views=True,
        )
        return MethodLoss.of_pairs(losses_BP, weigh, embeddings=embeddings)

    def contrast_features(self, views: ViewTensors) -> Float[Tensor, "slots batch dim"]:
        """Return the normalised projections of the chosen views."""
        return self._project(views)[0]

    def _project(self, views: ViewTensors) -> tuple[Float[Tensor, "views batch dim"], Reusable]:
        """Return projections of unit length, float32, and what scoring keeps of the encoder."""
        features, kept = self.encode_views(views)
        projections = self.projector(features.flatten(0, 1))
        return F.normalize(projections.float(), dim=-1).unflatten(0, features.shape[:2]), kept


@in_float32
def nt_xent(
    own_SBD: Float[Tensor, "2 batch dim"],
    everything_SND: Float[Tensor, "2 images dim"],
    *,
    first_image: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """Return the NT-Xent loss of this rank's rows in two slots, mean over them.

    l(i) = -log(exp(s(i, i+)/t) / sum over j != i of exp(s(i, j)/t)), j over both slots of all images.

    Args:
        own_SBD: projections of unit length of this rank's images.
        everything_SND: of all ranks' images.
        first_image: index of the first of the B images among the N.
        temperature: t.

    Source: SimCLR, equation 1. The mean over ranks of this loss is the loss of the global batch. So is its gradient, with
    a gather whose gradient reaches the other ranks. (automl/hvp keeps the local part only: 1 / R of the gradient.)
    """
    positions = first_image + torch.arange(own_SBD.shape[1], device=own_SBD.device)
    losses = []
    for anchor, other in ((0, 1), (1, 0)):
        same = own_SBD[anchor] @ everything_SND[anchor].T / temperature
        same = same.scatter(1, positions[:, None], -torch.inf)
        across = own_SBD[anchor] @ everything_SND[other].T / temperature
        losses.append(F.cross_entropy(torch.cat([across, same], dim=1), positions))
    return torch.stack(losses).mean()


@in_float32
def score_pairs(
    own_VBD: Float[Tensor, "views batch dim"],
    everything_VND: Float[Tensor, "views images dim"],
    pairs: Int64[Tensor, "pairs 2"],
    *,
    first_image: int,
    temperature: float,
    negatives_of_all_views: bool = False,
    first_round: tuple[Float[Tensor, "2 all_images dim"], Int64[Tensor, " batch"]] | None = None,
) -> Float[Tensor, "batch pairs"]:
    """Return the NT-Xent loss of pairs of views: the score of a pair, and the terms of training on several; differentiable.

    score(m, n) = (l(m -> n) + l(n -> m)) / 2 with l(m -> n) = log(E[m, m] + E[m, n]) - s(m, n)/t, where
    E[m, v] = sum over images j of exp(s(view m of this image, view v of image j)/t), without this image if v = m.

    Args:
        own_VBD: projections of unit length of this rank's images.
        everything_VND: of all ranks' images.
        pairs: pairs to score.
        first_image: index of the first of the B images among the N.
        temperature: t.
        negatives_of_all_views: the denominator has the views of the other images of *all* V views, and the positive.
        first_round: with rescue, projections of views 0 and 1 of the images of all ranks, rescued or not, and the indices of
            this rank's rescued images among them. `own_VBD` and `everything_VND` are those of rescued images. Other views
            have fewer negatives then, which weigh as much as those of views 0 and 1.

    Source: automl/hvp, branch simclr, losses/nt_xent_loss.py:17-44 (the sum of both directions; here their mean). The
    negatives of all views are a proposal of the paper's reviewers.
    Differs: one gather and V * V blocks of similarities, instead of a gather and a [2N, 2N, D] product for each pair.
    """
    num_views, num_images = own_VBD.shape[:2]
    device = own_VBD.device
    own = torch.arange(num_images, device=device)
    columns = [(of_view, first_image + own) for of_view in everything_VND]
    if first_round is not None:
        columns[:2] = [(of_view, first_round[1]) for of_view in first_round[0]]
    most_negatives = len(columns[0][0]) - 1
    energies, positives = [], []
    for m in range(num_views):
        for v, (of_view, positions) in enumerate(columns):
            block = own_VBD[m] @ of_view.T / temperature
            positives.append(block[own, positions])
            if 0 < len(of_view) - 1 < most_negatives:
                block = block + math.log(most_negatives / (len(of_view) - 1))
                block = block.scatter(1, positions[:, None], positives[-1][:, None])
            if v == m or negatives_of_all_views:
                block = block.scatter(1, positions[:, None], -torch.inf)
            energies.append(block.logsumexp(dim=1))
    energy_VVB, positive_VVB = (
        torch.stack(of_blocks).unflatten(0, (num_views, num_views)) for of_blocks in (energies, positives)
    )  # the energy is log E
    first, second = pairs[:, 0], pairs[:, 1]

    def direction(anchor: Tensor, other: Tensor) -> Tensor:
        positive = positive_VVB[anchor, other]
        if negatives_of_all_views:
            denominator = torch.logaddexp(energy_VVB[anchor].logsumexp(dim=1), positive)
        else:
            denominator = torch.logaddexp(energy_VVB[anchor, anchor], energy_VVB[anchor, other])
        return denominator - positive

    return ((direction(first, second) + direction(second, first)) / 2).T


def _join_ranks(gathered_RVBD: Float[Tensor, "ranks views batch dim"]) -> Float[Tensor, "views images dim"]:
    return gathered_RVBD.transpose(0, 1).flatten(1, 2)
