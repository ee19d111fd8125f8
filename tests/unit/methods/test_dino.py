"""DINO: loss and centre against lightly's, scores against the paper's loop over tuples, the teacher, what scoring leaves."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss
from torch.utils.flop_counter import FlopCounterMode

from hvp_ray.methods import self_distillation as distillation
from hvp_ray.methods.dino import Dino
from hvp_ray.methods.heads import PrototypeHead
from hvp_ray.methods.method import StepPosition, ViewTensors, build_method
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import Candidates, choose_views, score_views
from tests.helpers import slow_cross_entropy, slow_dino_score

VIT = get_recipe("ibot-digits").method.backbone
CANDIDATES = Candidates(num_views=4, num_local_views=5, num_chosen_local_views=2, alternating=True)


def _method(**options: object) -> Dino:
    config = get_recipe("dino-digits").method
    backbone = dataclasses.replace(VIT, dim=32, depth=2, num_heads=2)
    settings = {"backbone": backbone, "num_prototypes": 24, "teacher_temperature": 0.04} | options
    method = build_method(dataclasses.replace(config, **settings))
    assert isinstance(method, Dino)
    with torch.no_grad():
        method.center.copy_(torch.randn(24) * 0.02)
        for parameter in method.teacher_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return method.train()


def _views(num_views: int = 4, num_locals: int = 5, num_images: int = 3) -> ViewTensors:
    return ViewTensors(
        global_views=torch.randn(num_views, num_images, 3, 16, 16),
        local_views=torch.randn(num_locals, num_images, 3, 8, 8) if num_locals else None,
    )


def test_loss_and_centre_equal_lightlys() -> None:
    teacher, student = torch.randn(2, 6, 24), torch.randn(5, 6, 24, requires_grad=True)
    loss = DINOLoss(24, teacher_temp=0.04, student_temp=0.1, center_momentum=0.9)
    loss.center.copy_(torch.randn(1, 1, 24))
    center = loss.center.flatten().clone()
    targets = distillation.teacher_probabilities(teacher, center, torch.tensor(0.04))
    mine = distillation.mean_of_cross_views(distillation.cross_entropies(targets, student, 0.1))
    expected = loss(list(teacher), list(student))
    torch.testing.assert_close(mine, expected)
    (gradient,) = torch.autograd.grad(mine, student)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, expected_gradient)
    # the centre that lightly's loss has moved, against after_update's rule
    torch.testing.assert_close(center.lerp(teacher.mean(dim=(0, 1)), 0.1), loss.center.flatten())


def test_terms_are_float32_under_autocast_and_logits_are_not() -> None:
    targets, logits = torch.softmax(torch.randn(2, 6, 500), dim=-1), torch.randn(5, 6, 500)
    terms = distillation.cross_entropies(targets, logits, 0.1)
    made_under: list[bool] = []

    def made_on_the_way():
        for of_view in logits:
            made_under.append(torch.is_autocast_enabled("cpu"))
            yield of_view

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distillation.cross_entropies(targets, made_on_the_way(), 0.1), terms)
    assert made_under == [True] * 5  # the large product with the prototypes stays in bfloat16


def _logits(method: Dino, views: ViewTensors) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the teacher on global views [G, B, K] and of the student on all [G + L, B, K], one view at a time."""
    assert views.local_views is not None
    with torch.no_grad():
        teacher = [
            method.teacher_head.logits(method.teacher_head(method.teacher_backbone(v))) for v in views.global_views
        ]
        student = [
            method.head.logits(method.head(method.backbone(v))) for v in (*views.global_views, *views.local_views)
        ]
    return torch.stack(teacher).double().numpy(), torch.stack(student).double().numpy()


def test_scores_equal_the_papers_loop_over_all_tuples() -> None:
    method = _method().eval()  # no drop path, so that views can be forwarded one by one
    views = _views()
    teacher, student = _logits(method, views)
    center = method.center.double().numpy()

    def cross_entropy(t: np.ndarray, s: np.ndarray) -> float:
        return slow_cross_entropy(t, s, center, 0.04, 0.1)

    scores = score_views(method.score, views, CANDIDATES, module=method)
    selection = choose_views("hardest", CANDIDATES, num_images=3, device=torch.device("cpu"), scores=scores)
    assert selection.scores is not None
    assert selection.local_indices is not None
    for image in range(3):
        tuples = {
            (tuple(pair), of_locals): slow_dino_score(
                teacher[:, image], student[:, image], tuple(pair), of_locals, cross_entropy
            )
            for pair in CANDIDATES.pairs.tolist()
            for of_locals in itertools.combinations(range(5), 2)
        }
        hardest = max(tuples, key=lambda key: tuples[key])
        assert float(selection.scores[image]) == pytest.approx(tuples[hardest], rel=1e-5)
        chosen = (tuple(selection.view_indices[:, image].tolist()), tuple(selection.local_indices[:, image].tolist()))
        assert chosen == hardest
        assert [view % 2 for view in chosen[0]] == [0, 1]  # each slot keeps its transform


def test_score_of_a_tuple_is_the_loss_of_training_on_it() -> None:
    method = _method().eval()
    views = _views(num_images=1)
    assert views.local_views is not None
    scores = score_views(method.score, views, CANDIDATES, module=method)
    assert scores.locals_BPL is not None
    for column, pair in enumerate(CANDIDATES.pairs.tolist()):
        chosen = ViewTensors(global_views=views.global_views[pair], local_views=views.local_views[[1, 4]])
        expected = float(scores.pairs_BP[0, column] + scores.locals_BPL[0, column, [1, 4]].sum())
        assert float(method(chosen).loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recipe", ["dino-digits", "ibot-digits"])
def test_scoring_touches_neither_centre_nor_teacher_nor_student(recipe: str) -> None:
    method = build_method(get_recipe(recipe).method).train()
    views = _views(num_views=4, num_locals=4)
    if recipe == "ibot-digits":
        views = dataclasses.replace(views, masks=torch.rand(4, 3, 4, 4) < 0.3)
    before = copy.deepcopy(method.state_dict())
    score_views(
        method.score, views, Candidates(num_views=4, num_local_views=4, num_chosen_local_views=2), module=method
    )
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in method.parameters())


def test_scoring_4_and_16_views_evaluates_76_cross_entropies() -> None:
    """Counted in multiplications: one inner product over the prototypes for each (teacher view, student view)."""
    targets, logits = torch.rand(4, 2, 1000), torch.randn(20, 2, 1000)
    with FlopCounterMode(display=False) as counter:
        crosses = distillation.cross_entropies(targets, logits, 0.1)
    products = counter.get_total_flops() / (2 * 1000 * 2)
    assert products == 80  # 4 x 20; four of them are a view with itself and stay unused: 76
    used = Candidates(num_views=4, num_local_views=16, num_chosen_local_views=8, alternating=True)
    assert distillation.score_tuples(crosses, used).locals_BPL.shape == (2, 4, 16)


def test_teacher_and_centre_move_by_their_momenta_after_the_update() -> None:
    method = _method(teacher_momentum=0.9)
    method.begin_step(StepPosition(step=0, num_steps=10, steps_per_epoch=5))
    before = copy.deepcopy(method)
    method.after_update({"center": torch.ones(24)})
    for name in ("backbone", "head"):
        student = dict(getattr(method, name).named_parameters())
        old = dict(getattr(before, f"teacher_{name}").named_parameters())
        for key, value in getattr(method, f"teacher_{name}").named_parameters():
            torch.testing.assert_close(value, 0.9 * old[key] + 0.1 * student[key])
            assert not value.requires_grad
    torch.testing.assert_close(method.center, 0.9 * before.center + 0.1)


def test_prototypes_are_frozen_in_the_first_epochs_only() -> None:
    method = _method(freeze_last_layer_epochs=2, norm_last_layer=False)
    for step, frozen in ((0, True), (9, True), (10, False)):
        method.begin_step(StepPosition(step=step, num_steps=50, steps_per_epoch=5))
        method.zero_grad()
        method(_views(2, 2)).loss.backward()
        method.before_update()
        assert (method.head.prototypes.direction.grad is None) is frozen
        assert (method.head.prototypes.length.grad is None) is frozen
        assert method.head.mlp[0].weight.grad is not None


def test_teacher_has_no_drop_path_and_starts_as_the_student() -> None:
    method = build_method(dataclasses.replace(get_recipe("dino-digits").method, backbone=VIT))
    for mine, theirs in zip(method.teacher_backbone.parameters(), method.backbone.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    def rates(network: torch.nn.Module) -> list[float]:
        return [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]

    assert max(rates(method.backbone)) > 0
    assert rates(method.teacher_backbone) == []
    assert method.encoder is method.teacher_backbone


def test_logits_come_view_by_view_and_are_cosines_times_length() -> None:
    head = PrototypeHead(8, hidden_dim=16, bottleneck_dim=4, num_prototypes=10, norm_last_layer=True)
    bottleneck = head(torch.randn(3, 5, 8))
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(3, 5))
    logits = head.logits(bottleneck)
    torch.testing.assert_close(torch.stack(list(head.logits_by_view(bottleneck))), logits)
    direction = head.prototypes.direction[3]
    torch.testing.assert_close(logits[1, 2, 3], torch.cosine_similarity(bottleneck[1, 2], direction, dim=0))
    assert not head.prototypes.length.requires_grad
    with torch.no_grad():
        head.prototypes.length.mul_(2.0)
    torch.testing.assert_close(head.logits(bottleneck), 2 * logits)
