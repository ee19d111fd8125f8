"""Common parts of DINO and iBOT: a teacher that follows the student, and cross-entropies over prototypes.

Legend: A teacher views, V student views, G global views, L local views, B images, K prototypes, P pairs, k local views
trained on.
"""

import copy
import math
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hvp_ray.methods.method import in_float32
from hvp_ray.selection.candidates import Candidates, CandidateScores

Head = TypeVar("Head", bound=nn.Module)


def freeze(module: nn.Module) -> nn.Module:
    """Mark the parameters as not trained by gradients; return `module`."""
    return module.requires_grad_(requires_grad=False)


def frozen_copy(module: Head) -> Head:
    """Return a teacher's copy of a student's module."""
    copied = copy.deepcopy(module)
    freeze(copied)
    return copied


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters: teacher = momentum * teacher + (1 - momentum) * student.

    Buffers (BatchNorm statistics) are left alone: the teacher gathers its own. Source: DINO, algorithm 1.
    """
    of_teacher: list[Tensor] = list(teacher.parameters())
    of_student: list[Tensor] = list(student.parameters())
    torch._foreach_mul_(of_teacher, momentum)
    torch._foreach_add_(of_teacher, of_student, alpha=1.0 - momentum)


def teacher_momentum_at(start: float, step: int, num_steps: int) -> float:
    """Return the teacher's momentum of a step: from `start` to 1 along a cosine. Source: DINO, section 3.2."""
    return 1.0 + 0.5 * (start - 1.0) * (1.0 + math.cos(math.pi * step / num_steps))


def temperature_at(warmup: float, final: float, warmup_epochs: int, epoch: int) -> float:
    """Return the teacher's temperature of an epoch: linear from `warmup` to `final`, which the last warm-up epoch has."""
    if epoch >= warmup_epochs:
        return final
    return warmup + (final - warmup) * epoch / max(1, warmup_epochs - 1)


def teacher_probabilities(
    logits: Float[Tensor, "*images prototypes"], center: Float[Tensor, " prototypes"], temperature: Tensor
) -> Float[Tensor, "*images prototypes"]:
    """Return the centred and sharpened softmax. Source: DINO, section 3.1."""
    return F.softmax((logits - center) / temperature, dim=-1)


def cross_entropies(
    targets_ABK: Float[Tensor, "teacher_views batch prototypes"],
    student_logits: Iterable[Float[Tensor, "batch prototypes"]],
    temperature: float,
) -> Float[Tensor, "batch teacher_views student_views"]:
    """Return T[b, a, v] = -sum over k of q_a[b, k] * log_softmax(s_v[b] / t)[k], each once.

    As q sums to 1, T = logsumexp(s_v / t) - <q_a, s_v> / t: one log-sum-exp per student view and one product, no
    [B, P, K] tensor. The logits come one view at a time and need not all exist at once.
    """
    # The iterator computes logits in the caller's precision; the cross-entropies are float32.
    return torch.stack([_cross_entropies_of(targets_ABK, logits, temperature) for logits in student_logits], dim=2)


@in_float32
def _cross_entropies_of(
    targets_ABK: Float[Tensor, "teacher_views batch prototypes"],
    logits_BK: Float[Tensor, "batch prototypes"],
    temperature: float,
) -> Float[Tensor, "batch teacher_views"]:
    scaled = logits_BK / temperature
    return scaled.logsumexp(dim=1)[:, None] - torch.einsum("abk,bk->ba", targets_ABK, scaled)


def mean_of_cross_views(crosses_BAV: Float[Tensor, "batch teacher_views student_views"]) -> Float[Tensor, ""]:
    """Return the DINO loss: mean over the images and over all (teacher view a, student view v) with v != a.

    Of two teacher views this is the mean of `losses_of_pairs`. Of more it is not: here a local view's term counts as much
    as that of two global views, so more global views would leave less of the loss to the local ones.
    """
    num_teacher_views, num_student_views = crosses_BAV.shape[1:]
    same = crosses_BAV.diagonal(dim1=1, dim2=2).sum()
    terms = num_teacher_views * num_student_views - num_teacher_views
    return (crosses_BAV.sum() - same) / (crosses_BAV.shape[0] * terms)


def score_tuples(
    crosses_BAV: Float[Tensor, "batch teacher_views student_views"], candidates: Candidates
) -> CandidateScores:
    """Score all (pair of global views, k local views) by the DINO loss they would give, from the matrix of terms.

    score(g1, g2, l_1 .. l_k) = (T[g1, g2] + T[g2, g1] + sum over j of (T[g1, l_j] + T[g2, l_j])) / (2 + 2k)

    Source: automl/hvp, branch dino, utils/dino.py:155-165 (the sum of the terms). Differs: every term is evaluated once
    (76 for 4 + 16 views; a view with itself makes 4 more, unused). The reference evaluates 18 for each of its 128
    candidates.
    """
    terms = 2 + 2 * candidates.num_chosen_local_views
    pairs = candidates.pairs_on(crosses_BAV.device)
    first, second = pairs[:, 0], pairs[:, 1]
    pairs_BP = (crosses_BAV[:, first, second] + crosses_BAV[:, second, first]) / terms
    if not candidates.num_local_views:
        return CandidateScores(pairs_BP=pairs_BP)
    of_locals = crosses_BAV[:, :, candidates.num_views :]
    return CandidateScores(pairs_BP=pairs_BP, locals_BPL=(of_locals[:, first] + of_locals[:, second]) / terms)


def losses_of_pairs(
    crosses_BAV: Float[Tensor, "batch teacher_views student_views"], candidates: Candidates
) -> Float[Tensor, "batch pairs"]:
    """Return DINO's loss of each pair of global views with all local views: the score of that candidate.

    Its mean over the pairs leaves L / (1 + L) of the loss to the local views, for any number of global views.
    """
    return score_tuples(crosses_BAV, candidates).with_all_locals()


@in_float32
def teacher_measurements(
    probabilities: Float[Tensor, "*samples prototypes"],
    counts: Bool[Tensor, "*samples"] | None = None,
    *,
    of: str = "teacher",
) -> dict[str, Float[Tensor, ""]]:
    """Return the teacher's entropy and its mutual information with the sample. The second is near 0 after a collapse.

    The mean entropy is near 0 for one-hot outputs and near log K for uniform ones. The entropy of the mean output minus
    it (the mutual information of sample and prototype) is 0 if all samples get the same output.

    Args:
        probabilities: the teacher's output for images or patches.
        counts: mask of the samples to use; None: all. Without any, both values are NaN.
        of: part of their names.
    """
    outputs = probabilities.detach().flatten(0, -2)
    weights = outputs.new_ones(len(outputs)) if counts is None else counts.flatten().to(outputs.dtype)
    weights = weights / weights.sum()
    entropy = -(torch.special.xlogy(outputs, outputs).sum(dim=-1) * weights).sum()
    mean = weights @ outputs
    entropy_of_mean = -torch.special.xlogy(mean, mean).sum()
    return {f"collapse/{of}_entropy": entropy, f"collapse/{of}_information": entropy_of_mean - entropy}
