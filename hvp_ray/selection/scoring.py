"""The scoring pass: every view forward once, with the weights of this very step, without gradient."""

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
    """Score all candidates without a trace: no gradient, and BatchNorm as `batch_norm` says.

    Args:
        score: the method's scoring function; it forwards all views at once.
        views: normalised views (`hvp_ray.methods.method.ViewTensors`).
        candidates: what can be chosen.
        module: the network that `score` uses, in training mode.
        batch_norm: batch (statistics of these views, running statistics untouched), faithful (as the authors' code:
            scoring moves the running statistics), running (the running statistics).
    """
    with torch.no_grad(), batch_norm_for_scoring(module, batch_norm):
        return score(views, candidates)


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
