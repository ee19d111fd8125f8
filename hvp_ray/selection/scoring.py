"""The scoring pass: forward every view once with the weights of this step, without gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvp_ray.selection.candidates import Candidates, CandidateScores

ScoringBatchNorm = Literal["batch", "faithful", "running"]
V = TypeVar("V")


def score_views(
    score: Callable[[V, Candidates], CandidateScores],
    views: V,
    candidates: Candidates,
    *,
    module: nn.Module,
    batch_norm: ScoringBatchNorm = "batch",
) -> CandidateScores:
    """Score all candidates without gradient, with BatchNorm in the given mode.

    Args:
        score: the method's scoring function; it forwards all views at once.
        views: normalised views (`hvp_ray.methods.method.ViewTensors`).
        candidates: candidates of these views.
        module: the network that `score` uses, in training mode.
        batch_norm: batch uses the statistics of these views and keeps the running ones. faithful also moves the running
            statistics, as the authors' code does. running uses the running statistics.
    """
    with torch.no_grad(), batch_norm_for_scoring(module, batch_norm):
        return score(views, candidates)


@contextmanager
def batch_norm_for_scoring(module: nn.Module, mode: ScoringBatchNorm) -> Iterator[None]:
    """Switch every BatchNorm of `module` to the scoring mode, and restore it on exit."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        match mode:
            case "batch":
                # In training mode torch reads this flag only to decide whether to update running statistics.
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
