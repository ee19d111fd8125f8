"""The interface of a self-supervised method to the training step. A new method implements it.

A method is one file with a `Method`. Its `forward` is the training loss on the chosen views, so that DDP, compilation
and autocast wrap it. Its `score` gives the loss of each candidate. docs/new_method.md has an example.

Legend: V global views, L local views, B images, P pairs, h, w patches (cells of a mask).
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from hvp_ray.config import MethodConfig
from hvp_ray.errors import ConfigError
from hvp_ray.methods.backbones import checkpointed_blocks, without_checkpointing
from hvp_ray.row_reuse import Kept, RowReuse
from hvp_ray.selection.candidates import Candidates, CandidateScores, KeptViews, Reusable
from hvp_ray.selection.rescue import score_with_rescue
from hvp_ray.selection.view_outputs import ViewOutputs
from hvp_ray.selection.weights import PairWeighting, effective_pairs, mean_of_pairs

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewTensors:
    """Normalised views of B images, on the trainer's device: the candidates when scored, the chosen ones when trained."""

    global_views: Float[Tensor, "views batch channels height width"]
    local_views: Float[Tensor, "local_views batch channels small_height small_width"] | None = None
    """None: there are none."""
    masks: Bool[Tensor, "views batch patch_rows patch_columns"] | None = None
    """Masks of the global views, True is masked; None: there are none."""
    max_masked_patches: int | None = None
    """No view has more masked patches than this; None: all may be masked."""
    reusable: dict[str, Float[Tensor, "views batch *rest"]] = field(default_factory=dict)
    """`CandidateScores.reusable` of these very views; empty: everything is computed."""
    alternating: bool = False
    """Pairs are (even view, odd view) only; see `pair_table`."""
    keep_rows: bool = False
    """Scoring keeps what the backward of the student's encoder needs (`selection.reuse_student`)."""

    def first_pair(self) -> "ViewTensors":
        """Return global views 0 and 1, and all local views."""
        masks = None if self.masks is None else self.masks[:2]
        return replace(self, global_views=self.global_views[:2], masks=masks)

    def other_globals(self, images: Int64[Tensor, " some"]) -> "ViewTensors":
        """Return the global views of some images that `first_pair` leaves out, and no local views."""
        masks = None if self.masks is None else self.masks[2:, images]
        return replace(self, global_views=self.global_views[2:, images], local_views=None, masks=masks)

    def as_candidates(self) -> Candidates:
        """Return all admissible pairs of these views, each with all local views."""
        num_local_views = 0 if self.local_views is None else len(self.local_views)
        return Candidates(
            num_views=len(self.global_views),
            num_local_views=num_local_views,
            num_chosen_local_views=num_local_views,
            alternating=self.alternating,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """Features that a part of a step contrasts with, if gradients are accumulated and the loss is not per sample."""

    features: Float[Tensor, "parts slots batch dim"]
    """`Method.contrast_features` of all parts of the step on this rank."""
    part: int
    """Index of the part that is trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodLoss:
    """Result of one training forward."""

    loss: Float[Tensor, ""]
    """Mean over the images of this rank; differentiable."""
    embeddings: Float[Tensor, "batch dim"]
    """Embeddings of one view of each image, detached; watched for collapse."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Detached means over the images, which `Method.after_update` gets back as means over all ranks."""
    measurements: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Detached numbers to be recorded, by the names of `tracking/metrics.toml`."""
    pair_losses: Float[Tensor, "batch pairs"] | None = None
    """Loss of each pair, detached; columns as `Candidates.pairs`. None: the loss is no mean over several pairs."""
    pair_weights: Float[Tensor, "batch pairs"] | None = None
    """Weight of each pair, detached; rows sum to 1. None: all pairs count alike."""

    @staticmethod
    def of_pairs(
        losses_BP: Float[Tensor, "batch pairs"],
        weigh: PairWeighting | None,
        *,
        embeddings: Float[Tensor, "batch dim"],
        statistics: dict[str, Tensor] | None = None,
        measurements: dict[str, Float[Tensor, ""]] | None = None,
    ) -> "MethodLoss":
        """Return the loss of training on several pairs of each image: mean over images of their weighted mean."""
        weights_BP = None if weigh is None else weigh(losses_BP)
        of_weights = {} if weights_BP is None else {"selection/effective_pairs": effective_pairs(weights_BP)}
        return MethodLoss(
            loss=mean_of_pairs(losses_BP, weights_BP),
            embeddings=embeddings,
            statistics=statistics or {},
            measurements=(measurements or {}) | of_weights,
            pair_losses=losses_BP.detach(),
            pair_weights=weights_BP,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPosition:
    """Position of a step in the run. Schedules are functions of it."""

    step: int
    """From 0."""
    num_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """From 0."""
        return self.step // self.steps_per_epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The information about the other trainers that a method needs."""

    rank: int = 0
    gather: Callable[[Tensor], Tensor] = lambda values: values[None]
    """[...] -> [R, ...] of all ranks, differentiable: the gradient that arrives is that of all ranks' losses."""


ALONE = Ranks()


def in_float32(compute: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a loss or a score outside of autocast, which lowers every matrix product.

    With similarities in bfloat16, 8 to 16 % of SimCLR's chosen pairs changed.
    """

    @functools.wraps(compute)
    def computed(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return compute(*arguments, **options)

    return computed


class Method(nn.Module):
    """A self-supervised method. Implement `embed`, `compare` and `forward`; the rest has defaults."""

    backbone: nn.Module
    """The encoder that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self._row_reuse: dict[str, RowReuse] = {}
        self._compiles_rows = False
        self._forward_rows: Callable[..., tuple[Tensor, Kept]] = type(self)._forward_all_rows

    def score(self, views: ViewTensors, candidates: Candidates) -> CandidateScores:
        """Return the loss that each candidate would give; higher is harder; float32."""
        if candidates.rescue_share == 1.0:
            return self.compare(self.embed(views), candidates)
        return score_with_rescue(
            self.embed(views.first_pair()),
            lambda images: self.embed(views.other_globals(images)),
            self.compare,
            candidates,
        )

    def embed(self, views: ViewTensors) -> ViewOutputs:
        """Forward every view once; return all outputs that `compare` needs, each with dimensions (view, image, ...).

        There may be no local views, although the method has some (`selection.rescue_share`).
        """
        raise NotImplementedError

    def compare(self, outputs: ViewOutputs, candidates: Candidates) -> CandidateScores:
        """Return the scores of all candidates from the outputs for their views; see `score`.

        Values that do not depend on other views of the batch and have no gradient may go into `reusable`, and so may
        `outputs.kept`. `forward` then receives them with the chosen views, if scoring forwarded the views as training does.
        """
        raise NotImplementedError

    def forward(
        self, views: ViewTensors, contrast: Contrast | None = None, weigh: PairWeighting | None = None
    ) -> MethodLoss:
        """Return the training loss on the chosen views.

        With more than two global views (rule all_pairs) this is the mean over all pairs of `views.as_candidates()`, each
        with the loss that `score` would give it; `MethodLoss.of_pairs` weighs them by `weigh`.
        """
        raise NotImplementedError

    def encode_views(self, views: ViewTensors) -> tuple[Float[Tensor, "all_views batch dim"], Reusable]:
        """Forward `backbone` on the views, each size as one batch; return the features of global, then local views.

        The second result is that of `encode`.
        """
        features, kept = self.encode(self.backbone, views, views.global_views)
        if views.local_views is None:
            return features, kept
        of_locals, kept_of_locals = self.encode(self.backbone, views, views.local_views, are_local=True)
        return torch.cat([features, of_locals]), kept | kept_of_locals

    def encode(
        self,
        encoder: nn.Module,
        views: ViewTensors,
        *of_views: Shaped[Tensor, "views batch ..."],
        are_local: bool = False,
    ) -> tuple[Float[Tensor, "views batch *outputs"], Reusable]:
        """Forward the student's encoder on views of one size as one batch, or take what scoring kept.

        With `views.keep_rows`, scoring also gets what it puts into `ViewOutputs.kept`. `forward` then takes the
        outputs of the chosen views from `views.reusable`.

        Args:
            encoder: treats each view by itself; its parameters are trained.
            views: the views of the step.
            of_views: inputs of the encoder for each view, such as pixels and masks.
            are_local: the views are local views.
        """
        name = "student_local" if are_local else "student_global"
        if name in views.reusable:
            return views.reusable[name], {}
        shape = of_views[0].shape[:2]
        flat = [values.flatten(0, 1) for values in of_views]
        if not views.keep_rows:
            return encoder(*flat).unflatten(0, shape), {}
        outputs, kept = self._forward_rows(self, name, encoder, flat)
        return outputs.unflatten(0, shape), {name: KeptViews(kept=kept, num_images=shape[1], are_local=are_local)}

    def _forward_all_rows(self, name: str, encoder: nn.Module, rows: list[Tensor]) -> tuple[Tensor, Kept]:
        if name not in self._row_reuse:
            blocks = checkpointed_blocks(encoder)
            self._row_reuse[name] = RowReuse(encoder, keep_inputs_of=blocks, compiled=self._compiles_rows)
        with without_checkpointing(encoder):
            return self._row_reuse[name].forward_all(*rows)

    def compile_rows(self) -> None:
        """Compile `RowReuse` by itself, outside of the graphs of scoring."""
        self._compiles_rows = True
        disable: Any = torch.compiler.disable  # not as a decorator, because it imports Dynamo, which takes seconds
        self._forward_rows = disable(type(self)._forward_all_rows, reason="the halves are compiled by themselves")

    @property
    def encoder(self) -> nn.Module:
        """The encoder that is evaluated and exported: the teacher's, if there is one."""
        return self.backbone

    @property
    def encoders(self) -> list[nn.Module]:
        """All copies of the encoder; initial weights are loaded into each."""
        return [self.backbone]

    @property
    def patch_px(self) -> int:
        """Views of other sizes than those configured must be multiples of this."""
        return 1

    def constant_rate_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that may keep the initial learning rate."""
        return []

    def contrast_features(self, views: ViewTensors) -> Float[Tensor, "slots batch dim"] | None:
        """Return what the loss of one image needs of the other images; None: nothing, the loss is per sample."""
        return None

    def begin_step(self, position: StepPosition) -> None:
        """Set what follows a schedule (temperatures, momenta)."""

    def before_update(self) -> None:
        """Edit the gradients, after clipping."""

    def after_update(self, statistics: dict[str, Tensor]) -> None:
        """Update what gradients do not (teacher, centre), with `MethodLoss.statistics` as means over all ranks."""


def build_method(config: MethodConfig, ranks: Ranks = ALONE) -> Method:
    """Build the method that a config describes.

    Raises:
        ConfigError: the implementation cannot be imported, or is no `Method`.
    """
    module, _, name = config.implementation.partition(":")
    try:
        implementation: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the method {config.name} is {config.implementation}, which cannot be imported: {error}"
        ) from error
    if not (isinstance(implementation, type) and issubclass(implementation, Method)):
        raise ConfigError(f"the method {config.name} is {config.implementation}, which is no hvp_ray Method")
    return cast(Any, implementation)(config, ranks)
