"""DINOv2: Sinkhorn-Knopp and KoLeo against slow formulas, the loss against its parts, scores against the loss."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import KoLeoLoss
from torch import Tensor

from hvp_ray.methods.backbones import forward_tokens
from hvp_ray.methods.dinov2 import DinoV2
from hvp_ray.methods.koleo import nearest_neighbour_losses
from hvp_ray.methods.method import ALONE, StepPosition, ViewTensors, build_method
from hvp_ray.methods.sinkhorn_knopp import balanced_probabilities
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import Candidates, choose_views, score_views

K, PATCH_K = 24, 20


def _slow_sinkhorn(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """The official formula, entry by entry: prototypes get a mass of 1 / K, then samples one of 1 / N."""
    mass = np.exp(logits.astype(np.float64) / temperature).T
    prototypes, samples = mass.shape
    mass /= mass.sum()
    for _ in range(iterations):
        for prototype in range(prototypes):
            mass[prototype] /= mass[prototype].sum() * prototypes
        for sample in range(samples):
            mass[:, sample] /= mass[:, sample].sum() * samples
    return (mass * samples).T


def _slow_koleo(features: np.ndarray) -> np.ndarray:
    """-log of the distance to the nearest other feature, for features [B, D]."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    losses = []
    for row in range(len(unit)):
        nearest = max((i for i in range(len(unit)) if i != row), key=lambda i: float(unit[row] @ unit[i]))
        losses.append(-math.log(np.linalg.norm(unit[row] - unit[nearest])))
    return np.array(losses)


def _method(**options: Any) -> DinoV2:
    config = get_recipe("dinov2-digits").method
    backbone = dataclasses.replace(config.backbone, dim=32, depth=2, num_heads=2)
    settings = {"backbone": backbone, "num_prototypes": K, "num_patch_prototypes": PATCH_K}
    settings |= {"teacher_temperature": 0.04, "patch_teacher_temperature": 0.04} | options
    method = build_method(dataclasses.replace(config, **settings))
    assert isinstance(method, DinoV2)
    with torch.no_grad():
        method.mask_token.copy_(torch.randn(1, 32) * 0.1)
        for head in (method.teacher_head, method.teacher_patch_head):
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for block in (*method.backbone.blocks, *method.teacher_backbone.blocks):
            block.ls1.gamma.fill_(0.5)  # LayerScale starts so small that all images look alike
            block.ls2.gamma.fill_(0.5)
    return method.eval()


def _views(num_views: int = 2, num_images: int = 5) -> ViewTensors:
    masks = torch.rand(num_views, num_images, 4, 4) < 0.4
    masks[1, 0] = False
    return ViewTensors(
        global_views=torch.randn(num_views, num_images, 3, 16, 16),
        local_views=torch.randn(3, num_images, 3, 8, 8),
        masks=masks,
    )


@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_sinkhorn_equals_the_slow_formula_on_20_batches(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.rand(13, K, dtype=torch.float64, generator=generator) * 2 - 1
        exact = torch.tensor(temperature, dtype=torch.float64)
        found = balanced_probabilities(logits, exact, gather=ALONE.gather)
        np.testing.assert_allclose(found.numpy(), _slow_sinkhorn(logits.numpy(), temperature), rtol=1e-9)
        single = balanced_probabilities(logits.float(), torch.tensor(temperature), gather=ALONE.gather)
        torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-7)


def test_samples_that_do_not_count_are_as_if_they_were_not_there() -> None:
    logits, counts = torch.rand(30, K, dtype=torch.float64), torch.rand(30) < 0.5
    exact = torch.tensor(0.1, dtype=torch.float64)
    found = balanced_probabilities(logits, exact, gather=ALONE.gather, counts_N=counts)
    np.testing.assert_allclose(found[counts].numpy(), _slow_sinkhorn(logits[counts].numpy(), 0.1), rtol=1e-9)
    assert not found[~counts].any()
    nothing = balanced_probabilities(logits, torch.tensor(0.1), gather=ALONE.gather, counts_N=torch.zeros(30).bool())
    assert not nothing.any()


def test_many_iterations_give_every_prototype_the_same_mass_and_large_logits_stay_finite() -> None:
    logits = torch.rand(48, K) * 200 - 100
    found = balanced_probabilities(logits, torch.tensor(4.0), gather=ALONE.gather, iterations=300)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(48))
    torch.testing.assert_close(found.sum(dim=0), torch.full((K,), 48 / K), rtol=2e-2, atol=0.0)
    sharp = balanced_probabilities(logits * 100, torch.tensor(0.04), gather=ALONE.gather)
    assert torch.isfinite(sharp).all()


def test_koleo_equals_lightlys_and_the_slow_formula_in_value_and_gradient() -> None:
    lightlys, generator = KoLeoLoss(), torch.Generator().manual_seed(1)
    for _ in range(20):
        features = torch.randn(2, 7, 6, dtype=torch.float64, generator=generator).requires_grad_()
        losses = nearest_neighbour_losses(features, gather=ALONE.gather, rank=0)
        for view in range(2):
            np.testing.assert_allclose(
                losses[:, view].detach(), _slow_koleo(features[view].detach().numpy()), rtol=1e-5, atol=1e-7
            )
        (ours,) = torch.autograd.grad(losses.mean(dim=0).sum(), features)
        (theirs,) = torch.autograd.grad(sum(lightlys(view) for view in features), features)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert not nearest_neighbour_losses(torch.randn(2, 1, 6), gather=ALONE.gather, rank=0).any()


def _parts(method: DinoV2, views: ViewTensors) -> tuple[float, float, float]:
    """Class, patch and KoLeo part of the loss on two global views, by slow formulas."""
    assert views.masks is not None and views.local_views is not None
    prefix = method.backbone.num_prefix_tokens
    with torch.no_grad():
        teacher = torch.stack([forward_tokens(method.teacher_backbone, v) for v in views.global_views])
        student = torch.stack(
            [
                forward_tokens(method.backbone, v, mask=m, mask_token=method.mask_token)
                for v, m in zip(views.global_views, views.masks, strict=True)
            ]
        )
        of_locals = torch.stack([method.backbone(v) for v in views.local_views])

        def logits(head: Any, tokens: Tensor) -> np.ndarray:
            return head.logits(head(tokens)).double().numpy()

        class_targets = logits(method.teacher_head, teacher[:, :, 0])
        class_targets = _slow_sinkhorn(class_targets.reshape(-1, K), 0.04).reshape(class_targets.shape)
        of_student = np.concatenate([logits(method.head, student[:, :, 0]), logits(method.head, of_locals)])
        mask = views.masks.flatten(2).numpy()
        masked = logits(method.teacher_patch_head, teacher[:, :, prefix:])[mask]
        targets = np.zeros((*mask.shape, PATCH_K))
        targets[mask] = _slow_sinkhorn(masked, 0.04)
        of_patches = logits(method.patch_head, student[:, :, prefix:])

    def cross(q: np.ndarray, s: np.ndarray) -> float:
        scaled = s / 0.1
        return float(np.log(np.exp(scaled - scaled.max()).sum()) + scaled.max() - q @ scaled)

    num_images = mask.shape[1]
    terms = [
        cross(class_targets[a, b], of_student[v, b])
        for b in range(num_images)
        for a in range(2)
        for v in range(len(of_student))
        if v != a
    ]
    patch = np.mean(
        [
            np.mean([cross(targets[g, b, p], of_patches[g, b, p]) for p in np.flatnonzero(mask[g, b])])
            if mask[g, b].any()
            else 0.0
            for g in range(2)
            for b in range(num_images)
        ]
    )
    koleo = np.mean([_slow_koleo(tokens.double().numpy()) for tokens in student[:, :, 0]])
    return float(np.mean(terms)), float(patch), float(koleo)


def test_loss_is_that_of_the_paper() -> None:
    method, views = _method(patch_weight=1.3, koleo_weight=0.2), _views()
    of_class, of_patches, of_koleo = _parts(method, views)
    result = method(views)
    found = {name: float(result.measurements[f"train/{name}_loss"]) for name in ("class", "patch", "koleo")}
    assert found == pytest.approx({"class": of_class, "patch": of_patches, "koleo": of_koleo}, rel=1e-4)
    assert float(result.loss.detach()) == pytest.approx(of_class + 1.3 * of_patches + 2 * 0.2 * of_koleo, rel=1e-4)
    assert result.statistics == {} and not {"center", "patch_center"} & set(method.state_dict())


def test_loss_follows_the_slow_formulas_over_20_updates() -> None:
    """New views each time, and a student and a teacher that have moved; the formulas in float64 on outputs in float32."""
    method = _method(patch_weight=1.3, koleo_weight=0.2, freeze_last_layer_epochs=0)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    for step in range(20):
        method.begin_step(StepPosition(step=step, num_steps=20, steps_per_epoch=5))
        views = _views()
        of_class, of_patches, of_koleo = _parts(method, views)
        result = method(views)
        expected = of_class + 1.3 * of_patches + 2 * 0.2 * of_koleo
        assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-4), step
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        method.after_update(result.statistics)


@pytest.mark.parametrize("options", [{}, {"koleo_weight": 0.0}, {"patch_weight": 0.4, "class_weight": 0.8}])
def test_score_of_one_candidate_is_the_loss_and_scoring_changes_no_bit_of_training(options: dict[str, float]) -> None:
    method, views = _method(**options), _views()
    candidates = Candidates(num_views=2, num_local_views=3, num_chosen_local_views=3, alternating=True)
    scores = score_views(method.score, views, candidates, module=method)
    choice = choose_views("hardest", candidates, num_images=5, device=torch.device("cpu"), scores=scores)
    assert choice.scores is not None
    plain = method(views)
    assert float(choice.scores.mean()) == pytest.approx(float(plain.loss.detach()), rel=1e-5)
    again = method(dataclasses.replace(views, reusable=dict(scores.reusable)))
    assert set(scores.reusable) >= {"class_bottleneck", "patch_bottleneck"}
    for loss in (plain.loss, again.loss):
        loss.backward()
    assert torch.equal(plain.loss, again.loss)


def test_scores_prefer_what_is_harder_and_count_koleo_only_in_full() -> None:
    views = _views(num_views=4)
    candidates = Candidates(num_views=4, num_local_views=3, num_chosen_local_views=3, alternating=True)
    torch.manual_seed(3)
    full, of_class = _method(), _method(scoring="class")
    of_class.load_state_dict(full.state_dict())
    without = _method(koleo_weight=0.0)
    without.load_state_dict(full.state_dict())
    scores = {name: m.score(views, candidates).pairs_BP for name, m in
              {"full": full, "class": of_class, "without": without}.items()}  # fmt: skip
    koleo = nearest_neighbour_losses(full.embed(views).of_globals["tokens"], gather=ALONE.gather, rank=0)
    expected = 0.2 * koleo[:, torch.from_numpy(candidates.pairs)].mean(dim=2)
    torch.testing.assert_close(scores["full"] - scores["without"], expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(scores["class"], scores["without"])


def test_teacher_follows_and_prototypes_of_both_heads_are_frozen_at_first() -> None:
    method = _method(freeze_last_layer_epochs=1, teacher_momentum=0.9).train()
    method.begin_step(StepPosition(step=0, num_steps=10, steps_per_epoch=5))
    method(_views()).loss.backward()
    method.before_update()
    for head in (method.head, method.patch_head):
        assert all(parameter.grad is None for parameter in head.prototypes.parameters())
        assert all(parameter.grad is not None for parameter in head.mlp.parameters())
    before = method.teacher_patch_head.mlp[0].weight.clone()
    method.after_update({})
    expected = 0.9 * before + 0.1 * method.patch_head.mlp[0].weight
    torch.testing.assert_close(method.teacher_patch_head.mlp[0].weight, expected)
