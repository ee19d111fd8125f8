"""iBOT (Zhou et al., ICLR 2022) with hard views: DINO on the class token, and masked patches as a second target.

Legend: G global views, L local views, S slots of global views, B images, N patches of a view, M patches that may be
masked, K prototypes, D features.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hvp_ray.errors import ConfigError, ShapeError
from hvp_ray.methods import self_distillation as distillation
from hvp_ray.methods.backbones import forward_tokens
from hvp_ray.methods.configs import IBotConfig
from hvp_ray.methods.dino import Dino
from hvp_ray.methods.heads import PrototypeHead
from hvp_ray.methods.method import ALONE, Contrast, MethodLoss, Ranks, StepPosition, ViewTensors, in_float32
from hvp_ray.selection.candidates import Candidates, CandidateScores, Reusable
from hvp_ray.selection.view_outputs import ViewOutputs
from hvp_ray.selection.weights import PairWeighting, mean_of_pairs


class IBot(Dino):
    """DINO's student and teacher with one head for class token and patches; the student sees masked global views."""

    patch_center: Tensor
    patch_teacher_temperature: Tensor

    def __init__(self, config: IBotConfig, ranks: Ranks = ALONE) -> None:
        super().__init__(config, ranks)
        self._ibot = config
        vit = self.backbone
        if not (isinstance(vit, VisionTransformer) and vit.has_class_token and vit.global_pool == "token"):
            raise ConfigError(
                f"method.backbone.name={config.backbone.name!r} is not allowed: iBOT masks patches and has a loss on the "
                f"class token, so it needs a Vision Transformer with one, for instance vit_small_patch16_224"
            )
        self.mask_token = nn.Parameter(torch.zeros(1, vit.embed_dim))
        self.register_buffer("patch_center", torch.zeros(config.num_prototypes))
        temperature = torch.tensor(self._patch_temperature_at(epoch=0))
        self.register_buffer("patch_teacher_temperature", temperature, persistent=False)

    def begin_step(self, position: StepPosition) -> None:
        """Set temperatures and momentum."""
        super().begin_step(position)
        self.patch_teacher_temperature.fill_(self._patch_temperature_at(position.epoch))

    def embed(self, views: ViewTensors) -> ViewOutputs:
        """Forward the teacher on the global views, and the student on all, with masks."""
        student, teacher = self._student(views), self._teacher(views)
        of_globals, of_locals = student.class_bottleneck.tensor_split([len(views.global_views)])
        of_student = {
            "class": of_globals,
            "tokens": student.class_tokens[: len(views.global_views)],
            "patches": student.patch_bottleneck,
            "weights": student.weights,
        }
        return ViewOutputs(
            of_globals=of_student | {name: getattr(teacher, name) for name in _TEACHER_OUTPUTS},
            of_locals={"class": of_locals},
            kept=student.kept,
        )

    def compare(self, outputs: ViewOutputs, candidates: Candidates) -> CandidateScores:
        """Score class tokens of masked views as DINO does; with scoring=full, add each global view's own patch loss.

        score = class_weight * (DINO's score) + patch_weight * (P[g1] + P[g2]) / 2

        Source: automl/hvp, branch ibot, main_ibot.py:586-654. Differs: the patch loss of a view is evaluated once, not
        for every candidate, and on masked patches only.
        """
        config = self._ibot
        of_teacher = {name: outputs.of_globals[name] for name in _TEACHER_OUTPUTS}
        targets_GBK = self._probabilities(self.teacher_head.logits(of_teacher["class_bottleneck"]))
        logits = self.head.logits_by_view(outputs.of_all_views("class"))
        crosses = distillation.cross_entropies(targets_GBK, logits, config.student_temperature)
        of_class = distillation.score_tuples(crosses, candidates)
        pairs_BP, locals_BPL = config.class_weight * of_class.pairs_BP, of_class.locals_BPL
        if config.scoring == "full":
            tokens, patches, weights = (outputs.of_globals[name] for name in ("tokens", "patches", "weights"))
            of_views = self.losses_of_views(
                of_teacher["patch_bottleneck"], tokens=tokens, patches=patches, weights=weights
            )
            pairs_BP = pairs_BP + self._weighted({name: of_pairs(of_views[name], candidates) for name in of_views})
        if locals_BPL is not None:
            locals_BPL = config.class_weight * locals_BPL
        reusable = self._reusable(**of_teacher) | outputs.kept
        return CandidateScores(pairs_BP=pairs_BP, locals_BPL=locals_BPL, reusable=reusable)

    def forward(
        self, views: ViewTensors, contrast: Contrast | None = None, weigh: PairWeighting | None = None
    ) -> MethodLoss:
        """Return the class loss over views, plus the mean patch loss of the global slots.

        With more than two slots, mean over their pairs: each has DINO's class loss of the pair and all local views, and the
        mean patch loss of its two views.
        """
        config = self._ibot
        with torch.no_grad():
            teacher = self._teacher(views)
            class_logits = self.teacher_head.logits(teacher.class_bottleneck)
            targets_SBK = self._probabilities(class_logits)
            statistics = self.statistics(class_logits, teacher.patch_bottleneck_mean)
        student = self._student(views)
        logits = self.head.logits(student.class_bottleneck)
        crosses = distillation.cross_entropies(targets_SBK, logits, config.student_temperature)
        num_slots = len(views.global_views)
        of_patches: dict[str, Tensor] = {}
        of_views = self.losses_of_views(
            teacher.patch_bottleneck,
            measurements=of_patches,
            tokens=student.class_tokens[:num_slots],
            patches=student.patch_bottleneck,
            weights=student.weights,
        )
        common: dict[str, Any] = {
            "embeddings": student.class_tokens[0].detach(),
            "statistics": statistics,
            "measurements": distillation.teacher_measurements(targets_SBK) | of_patches,
        }
        if len(targets_SBK) == 2:
            class_loss = distillation.mean_of_cross_views(crosses)
            parts = {name: losses_BS.mean() for name, losses_BS in of_views.items()}
            result = MethodLoss(loss=config.class_weight * class_loss + self._weighted(parts), **common)
        else:
            candidates = views.as_candidates()
            class_BP = distillation.losses_of_pairs(crosses, candidates)
            parts_BP = {name: of_pairs(losses_BS, candidates) for name, losses_BS in of_views.items()}
            result = MethodLoss.of_pairs(config.class_weight * class_BP + self._weighted(parts_BP), weigh, **common)
            class_loss = mean_of_pairs(class_BP, result.pair_weights)
            parts = {name: mean_of_pairs(part_BP, result.pair_weights) for name, part_BP in parts_BP.items()}
        measured = {f"train/{name}_loss": loss.detach() for name, loss in ({"class": class_loss} | parts).items()}
        return replace(result, measurements=measured | result.measurements)

    def heads_of_patches(self) -> tuple[PrototypeHead, PrototypeHead]:
        """Return the heads of student and teacher that patches go through: those of the class token."""
        return self.head, self.teacher_head

    def statistics(
        self,
        class_logits: Float[Tensor, "views batch prototypes"],
        patch_bottleneck_mean: Float[Tensor, "views batch patch_bottleneck"],
    ) -> dict[str, Tensor]:
        """Return the means that the centres follow, of the teacher's logits."""
        # The logits are linear in the bottleneck, so the mean over all patches needs no logits of all patches.
        patch_mean = self.teacher_head.logits(patch_bottleneck_mean.mean(dim=(0, 1)))
        return {"center": class_logits.mean(dim=(0, 1)), "patch_center": patch_mean}

    def losses_of_views(
        self,
        of_teacher: Float[Tensor, "views batch masked bottleneck"],
        *,
        tokens: Float[Tensor, "views batch dim"],
        patches: Float[Tensor, "views batch masked bottleneck"],
        weights: Float[Tensor, "views batch masked"],
        measurements: dict[str, Tensor] | None = None,
    ) -> dict[str, Float[Tensor, "batch views"]]:
        """Return the parts of the loss that one global view has by itself, by name; `weights_of_parts` weighs them.

        Args:
            of_teacher: the teacher's output for the masked patches, before the prototypes.
            tokens: class tokens of the student, before the head.
            patches: the student's output for the masked patches.
            weights: see `patch_loss`.
            measurements: gets the teacher's entropy and information for the masked patches of the first view. None: they
                are not measured.
        """
        losses: list[Tensor] = []
        for targets, bottleneck, weights_BM in zip(
            self.patch_targets(of_teacher, weights), patches, weights, strict=True
        ):
            if measurements is not None and not losses:
                measurements |= distillation.teacher_measurements(targets, weights_BM > 0.0, of="patch_teacher")
            logits = self.heads_of_patches()[0].logits(bottleneck)
            losses.append(patch_loss(targets, logits, weights_BM, temperature=self._ibot.student_temperature))
        return {"patch": torch.stack(losses, dim=1)}

    def patch_targets(
        self,
        of_teacher: Float[Tensor, "views batch masked bottleneck"],
        weights: Float[Tensor, "views batch masked"],
    ) -> Iterable[Float[Tensor, "batch masked prototypes"]]:
        """Return the teacher's probabilities for the masked patches of each view, which need not all exist at once."""
        for of_view in of_teacher:
            with torch.no_grad():
                logits = self.teacher_head.logits(of_view)
                targets = distillation.teacher_probabilities(logits, self.patch_center, self.patch_teacher_temperature)
            yield targets

    def weights_of_parts(self) -> dict[str, float]:
        """Return the weight of each part of the loss."""
        return {"patch": self._ibot.patch_weight}

    def _weighted(self, parts: dict[str, Tensor]) -> Tensor:
        weights = self.weights_of_parts()
        return cast(Tensor, sum(weights[name] * part for name, part in parts.items()))

    def after_update(self, statistics: dict[str, Tensor]) -> None:
        """Update as DINO does, and move the centre of the patches."""
        super().after_update(statistics)
        self.patch_center.lerp_(statistics["patch_center"], 1.0 - self._ibot.patch_center_momentum)

    def _patch_temperature_at(self, epoch: int) -> float:
        config = self._ibot
        return distillation.temperature_at(
            config.warmup_patch_teacher_temperature,
            config.patch_teacher_temperature,
            config.warmup_patch_teacher_epochs,
            epoch,
        )

    def _student(self, views: ViewTensors) -> "_OfStudent":
        masked, vit = _MaskedPatches.of(views), cast(VisionTransformer, self.backbone)
        tokens, kept = self.encode(_MaskedEncoder(vit, self.mask_token), views, views.global_views, masked.mask)
        class_tokens = tokens[:, :, 0]
        if views.local_views is not None:
            of_locals, kept_of_locals = self.encode(vit, views, views.local_views, are_local=True)
            class_tokens, kept = torch.cat([class_tokens, of_locals]), kept | kept_of_locals
        patches = masked.take(tokens[:, :, vit.num_prefix_tokens :])
        return _OfStudent(
            class_tokens=class_tokens,
            class_bottleneck=self.head(class_tokens),
            patch_bottleneck=self.heads_of_patches()[0](patches),
            weights=masked.weights,
            kept=kept,
        )

    @torch.no_grad()
    def _teacher(self, views: ViewTensors) -> "_OfTeacher":
        """Return the teacher's outputs, computed by scoring or now."""
        if "class_bottleneck" in views.reusable:
            return _OfTeacher(**{name: views.reusable[name] for name in _TEACHER_OUTPUTS})
        masked = _MaskedPatches.of(views)
        vit, images = cast(VisionTransformer, self.teacher_backbone), views.global_views
        tokens = forward_tokens(vit, images.flatten(0, 1)).unflatten(0, images.shape[:2])
        patches = self.heads_of_patches()[1](tokens[:, :, vit.num_prefix_tokens :])
        return _OfTeacher(
            class_bottleneck=self.teacher_head(tokens[:, :, 0]),
            patch_bottleneck=masked.take(patches),
            patch_bottleneck_mean=patches.mean(dim=2),
        )


def of_pairs(losses_BG: Float[Tensor, "batch views"], candidates: Candidates) -> Float[Tensor, "batch pairs"]:
    """Return the mean loss of the two views of each pair."""
    return losses_BG[:, candidates.pairs_on(losses_BG.device)].mean(dim=2)


@in_float32
def patch_loss(
    targets_BMK: Float[Tensor, "batch patches prototypes"],
    logits_BMK: Float[Tensor, "batch patches prototypes"],
    weights_BM: Float[Tensor, "batch patches"],
    *,
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Return the weighted sum of the patches' cross-entropies; weights are 1 / number masked, or 0."""
    scaled = logits_BMK / temperature
    cross_BM = scaled.logsumexp(dim=-1) - (targets_BMK * scaled).sum(dim=-1)
    return (cross_BM * weights_BM).sum(dim=1)


class _MaskedEncoder(nn.Module):
    """The student's encoder on views with masked patches; its parts belong to the method."""

    def __init__(self, encoder: VisionTransformer, mask_token: nn.Parameter) -> None:
        super().__init__()
        self.encoder, self.mask_token = encoder, mask_token

    def forward(
        self, images: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return forward_tokens(self.encoder, images, mask=mask, mask_token=self.mask_token)


class _MaskedPatches:
    """Indices of the masked patches of the global views. Their number is fixed, so that no shape depends on values."""

    def __init__(self, mask: Bool[Tensor, "views batch rows columns"], max_masked: int | None) -> None:
        self.mask = mask
        flat = mask.flatten(2)
        number = flat.shape[2] if max_masked is None else min(max(1, max_masked), flat.shape[2])
        # Masked patches first, in their order; the rest fills up with weight 0.
        self.indices: Int64[Tensor, "views batch masked"] = flat.float().argsort(dim=2, descending=True, stable=True)[
            :, :, :number
        ]
        taken = flat.gather(2, self.indices).float()
        self.weights: Float[Tensor, "views batch masked"] = taken / taken.sum(dim=2, keepdim=True).clamp_min(1.0)

    @staticmethod
    def of(views: ViewTensors) -> "_MaskedPatches":
        if views.masks is None:
            raise ShapeError("iBOT needs the masks of the global views (views.masks)")
        return _MaskedPatches(views.masks, views.max_masked_patches)

    def take(self, patches: Float[Tensor, "views batch patches dim"]) -> Float[Tensor, "views batch masked dim"]:
        """Return what belongs to the masked patches."""
        return patches.gather(2, self.indices[..., None].expand(-1, -1, -1, patches.shape[-1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class _OfStudent:
    """Outputs before the prototypes."""

    class_tokens: Float[Tensor, "all_views batch dim"]
    class_bottleneck: Float[Tensor, "all_views batch bottleneck"]
    patch_bottleneck: Float[Tensor, "views batch masked patch_bottleneck"]
    weights: Float[Tensor, "views batch masked"]
    """See `_MaskedPatches`."""
    kept: Reusable
    """See `Method.encode`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _OfTeacher:
    """Outputs before the prototypes, of global views."""

    class_bottleneck: Float[Tensor, "views batch bottleneck"]
    patch_bottleneck: Float[Tensor, "views batch masked patch_bottleneck"]
    """Outputs of the patches that the student sees masked."""
    patch_bottleneck_mean: Float[Tensor, "views batch patch_bottleneck"]
    """Mean over all patches of a view."""


_TEACHER_OUTPUTS = tuple(field.name for field in fields(_OfTeacher))
