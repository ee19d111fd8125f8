"""The scoring pass: every view forward once, with the weights of this very step, without gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ScoringBatchNorm = Literal["batch", "faithful", "running"]


def score_views(
    score: Callable[[Float[Tensor, "views batch channels height width"]], Float[Tensor, "batch pairs"]],
    views_VB: Float[Tensor, "views batch channels height width"],
    *,
    module: nn.Module,
    batch_norm: ScoringBatchNorm = "batch",
) -> Float[Tensor, "batch pairs"]:
    """Score all pairs of views without a trace: no gradient, and BatchNorm as `batch_norm` says.

    Args:
        score: the method's scoring function; it forwards all views at once.
        views_VB: normalised views.
        module: the network that `score` uses, in training mode.
        batch_norm: batch (statistics of these views, running statistics untouched), faithful (as the authors' code:
            scoring moves the running statistics), running (the running statistics).
    """
    with torch.no_grad(), batch_norm_for_scoring(module, batch_norm):
        return score(views_VB)


@contextmanager
def batch_norm_for_scoring(module: nn.Module, mode: ScoringBatchNorm) -> Iterator[None]:
    """Put every BatchNorm of `module` into the scoring mode, and back afterwards."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        match mode:
            case "batch":
                # torch reads this flag in training mode only to decide whether running statistics move.
                layer.track_running_stats = False
            case "running":
                layer.training = False
            case "faithful":
                pass
    try:
        yield
    finally:
        for layer, (training, tracks) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracks
