"""Training on all pairs of several views: every method against its definition, written as loops over images and pairs."""

import copy
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hvp_ray.config import SelectionConfig
from hvp_ray.methods.backbones import forward_tokens
from hvp_ray.methods.method import Contrast, Method, MethodLoss, ViewTensors, build_method
from hvp_ray.methods.simclr import score_pairs
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import PairWeighting, pair_table, pair_weights_of

METHODS = ("simsiam", "simclr", "dino", "ibot", "dinov2")
MASKED = ("ibot", "dinov2")
IMAGES = 3
VIT = dataclasses.replace(get_recipe("ibot-digits").method.backbone, dim=16, depth=2, num_heads=2, drop_path=0.0)


def _method(name: str, **settings: Any) -> Method:
    """Build a method without drop path, whose teacher differs from its student; BatchNorm is frozen."""
    config = get_recipe(f"{name}-digits").method
    if name in ("dino", *MASKED):
        settings = {"num_prototypes": 12, "teacher_temperature": 0.04, "warmup_teacher_epochs": 0} | settings
    torch.manual_seed(0)
    method: Any = build_method(dataclasses.replace(config, backbone=VIT, **settings)).eval()
    with torch.no_grad():
        if name in ("dino", "ibot"):
            method.center.copy_(torch.randn(12) * 0.02)
        heads = {"dino": ["teacher_head"], "ibot": ["teacher_head"], "dinov2": ["teacher_head", "teacher_patch_head"]}
        for head in heads.get(name, []):
            for parameter in getattr(method, head).parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return method


def _views(name: str, num_views: int = 4, *, num_images: int = IMAGES, alternating: bool = False) -> ViewTensors:
    torch.manual_seed(1)
    multi_crop = name in ("dino", *MASKED)
    return ViewTensors(
        global_views=torch.randn(num_views, num_images, 3, 16, 16),
        local_views=torch.randn(2, num_images, 3, 8, 8) if multi_crop else None,
        masks=torch.rand(num_views, num_images, 4, 4) < 0.4 if name in MASKED else None,
        alternating=alternating,
    )


def _softmax_weights(views: ViewTensors) -> PairWeighting:
    selection = SelectionConfig(rule="all_pairs", weighting="softmax", weight_temperature=0.7)
    weigh = pair_weights_of(selection, views.as_candidates(), device=torch.device("cpu"))
    assert weigh is not None
    return weigh


def _slow_loss(losses_BP: list[list[Tensor]], *, weighted: bool) -> Tensor:
    """Mean over images of sum_p w_p s_p; w from the softmax of the losses in standard deviations, or 1 / P."""
    of_images = []
    for losses in losses_BP:
        values = [float(loss.detach()) for loss in losses]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        energies = [math.exp((value - mean) / (0.7 * deviation)) if weighted else 1.0 for value in values]
        of_images.append(sum(e / sum(energies) * loss for e, loss in zip(energies, losses, strict=True)))
    return sum(of_images) / len(of_images)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def _simsiam_pair(outputs: dict[str, Tensor], image: int, m: int, n: int) -> Tensor:
    p, z = outputs["predictions"][:, image], outputs["projections"][:, image].detach()
    return -(_cosine(p[m], z[n]) + _cosine(p[n], z[m])) / 2


def _simclr_pair(outputs: dict[str, Tensor], image: int, m: int, n: int) -> Tensor:
    """Negatives: all views of the other images. No other view of this image occurs."""
    z = outputs["projections"]
    directions = []
    for anchor, other in ((m, n), (n, m)):
        positive = torch.exp(_cosine(z[anchor, image], z[other, image]) / 0.5)
        negatives = sum(
            torch.exp(_cosine(z[anchor, image], z[view, j]) / 0.5)
            for view, j in itertools.product(range(z.shape[0]), range(z.shape[1]))
            if j != image
        )
        directions.append(-torch.log(positive / (positive + negatives)))
    return (directions[0] + directions[1]) / 2


def _cross_entropy(target: Tensor, student: Tensor) -> Tensor:
    return -(target * F.log_softmax(student / 0.1, dim=-1)).sum()


def _dino_pair(outputs: dict[str, Tensor], image: int, m: int, n: int) -> Tensor:
    targets, student, num_views = outputs["targets"][:, image], outputs["student"][:, image], len(outputs["targets"])
    terms = [
        _cross_entropy(targets[a], student[v])
        for a in (m, n)
        for v in (m, n, *range(num_views, len(student)))
        if v != a
    ]
    assert len(terms) == 2 + 2 * (len(student) - num_views)
    return sum(terms) / len(terms)


def _ibot_pair(outputs: dict[str, Tensor], image: int, m: int, n: int) -> Tensor:
    of_views = []
    for view in (m, n):
        masked = outputs["masks"][view, image].flatten().nonzero().flatten().tolist()
        patches = [
            _cross_entropy(outputs["patch targets"][view, image, patch], outputs["student patches"][view, image, patch])
            for patch in masked
        ]
        of_views.append(sum(patches) / max(1, len(patches)))
    return 0.7 * _dino_pair(outputs, image, m, n) + 1.3 * (of_views[0] + of_views[1]) / 2


def _dinov2_pair(outputs: dict[str, Tensor], image: int, m: int, n: int) -> Tensor:
    """iBOT's, with other targets, plus KoLeo: -log of the distance to the nearest other image in the same view."""
    of_views = []
    for view in (m, n):
        units = [token / token.norm() for token in outputs["tokens"][view]]
        others = [other for other in range(IMAGES) if other != image]
        nearest = max(others, key=lambda other, units=units: float(units[image].detach() @ units[other].detach()))
        of_views.append(-torch.log((units[image] - units[nearest]).norm()))
    return _ibot_pair(outputs, image, m, n) + 0.2 * (of_views[0] + of_views[1])


def _balanced(logits: Tensor, temperature: float) -> Tensor:
    """Sinkhorn-Knopp for logits [N, K]: three times, prototypes get a mass of 1 / K, then samples one of 1 / N."""
    mass = torch.exp(logits.double() / temperature)
    for _ in range(3):
        mass = torch.stack([column / column.sum() / mass.shape[1] for column in mass.T], dim=1)
        mass = torch.stack([row / row.sum() / mass.shape[0] for row in mass])
    return (mass * mass.shape[0]).float()


def _outputs(name: str, method: Any, views: ViewTensors) -> dict[str, Tensor]:
    """Forward the views one by one."""
    if name in ("simsiam", "simclr"):
        projections = torch.stack([method.projector(method.backbone(view)) for view in views.global_views])
        predictions = [method.predictor(z) for z in projections] if name == "simsiam" else [projections]
        return {"projections": projections, "predictions": torch.stack(predictions)}
    assert views.local_views is not None
    masks = views.masks if views.masks is not None else torch.zeros(len(views.global_views), IMAGES, 4, 4).bool()
    mask_token = getattr(method, "mask_token", torch.zeros(1, 16))

    def logits(head: Any, tokens: Tensor) -> Tensor:
        return head.logits(head(tokens))

    tokens = torch.stack(
        [
            forward_tokens(method.backbone, view, mask=mask, mask_token=mask_token)
            for view, mask in zip(views.global_views, masks, strict=True)
        ]
    )
    of_locals = [logits(method.head, method.backbone(view)) for view in views.local_views]
    patch_head = getattr(method, "patch_head", method.head)
    with torch.no_grad():
        teacher = torch.stack([forward_tokens(method.teacher_backbone, view) for view in views.global_views])
        of_teacher = logits(method.teacher_head, teacher[:, :, 0])
        of_patches = logits(getattr(method, "teacher_patch_head", method.teacher_head), teacher[:, :, 1:])
        if name == "dinov2":
            targets = _balanced(of_teacher.flatten(0, 1), 0.04).view_as(of_teacher)
            patch_targets, masked = torch.zeros_like(of_patches), masks.flatten(2)
            patch_targets[masked] = _balanced(of_patches[masked], 0.07)
        else:
            targets = F.softmax((of_teacher - method.center) / 0.04, dim=-1)
            patch_center = getattr(method, "patch_center", method.center)
            patch_targets = F.softmax((of_patches - patch_center) / 0.07, dim=-1)
    return {
        "targets": targets,
        "student": torch.stack([*logits(method.head, tokens[:, :, 0]), *of_locals]),
        "patch targets": patch_targets,
        "student patches": logits(patch_head, tokens[:, :, 1:]),
        "tokens": tokens[:, :, 0],
        "masks": masks,
    }


_PAIR_LOSSES = {
    "simsiam": _simsiam_pair,
    "simclr": _simclr_pair,
    "dino": _dino_pair,
    "ibot": _ibot_pair,
    "dinov2": _dinov2_pair,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "simsiam": {},
    "simclr": {"temperature": 0.5},
    "dino": {},
    "ibot": {
        "class_weight": 0.7,
        "patch_weight": 1.3,
        "patch_teacher_temperature": 0.07,
        "warmup_patch_teacher_epochs": 0,
    },
}
_SETTINGS["dinov2"] = _SETTINGS["ibot"] | {"koleo_weight": 0.2, "num_patch_prototypes": 10}


@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
@pytest.mark.parametrize("alternating", [False, True], ids=["", "alternating"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_loops_over_images_and_pairs(
    name: str, alternating: bool, weighted: bool
) -> None:
    method, views = _method(name, **_SETTINGS[name]), _views(name, alternating=alternating)
    twin = copy.deepcopy(method)
    pairs = pair_table(4, alternating=alternating).tolist()
    outputs = _outputs(name, twin, views)
    slow = [[_PAIR_LOSSES[name](outputs, image, m, n) for m, n in pairs] for image in range(IMAGES)]
    expected = _slow_loss(slow, weighted=weighted)
    result = method(views, None, _softmax_weights(views) if weighted else None)
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.pair_losses, torch.tensor([[loss.item() for loss in losses] for losses in slow]))
    result.loss.backward()
    expected.backward()
    for (key, mine), theirs in zip(method.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if mine.grad is not None:
            torch.testing.assert_close(
                mine.grad, theirs.grad, rtol=1e-3, atol=2e-6, msg=lambda text, key=key: key + text
            )


@pytest.mark.parametrize("name", METHODS)
def test_loss_of_a_pair_is_the_score_it_would_get(name: str) -> None:
    settings = _SETTINGS[name] | ({"scoring_negatives": "all"} if name == "simclr" else {})
    method, views = _method(name, **settings), _views(name)
    with torch.no_grad():
        scores = method.score(views, views.as_candidates())
        result = method(views, None, None)
    torch.testing.assert_close(scores.with_all_locals(), result.pair_losses)
    torch.testing.assert_close(result.loss, result.pair_losses.mean())


@pytest.mark.parametrize("name", METHODS)
def test_order_of_the_views_does_not_change_the_loss(name: str) -> None:
    method, views = _method(name), _views(name)
    order = [2, 0, 3, 1]
    masks = None if views.masks is None else views.masks[order]
    permuted = dataclasses.replace(views, global_views=views.global_views[order], masks=masks)
    weigh = _softmax_weights(views)
    torch.testing.assert_close(method(permuted, None, weigh).loss, method(views, None, weigh).loss)


@pytest.mark.parametrize("name", METHODS)
def test_result_has_detached_pairs_weights_and_their_number(name: str) -> None:
    method, views = _method(name), _views(name)
    weigh = _softmax_weights(views)
    result: MethodLoss = method(views, None, weigh)
    assert result.pair_losses is not None
    assert result.pair_weights is not None
    assert not result.pair_losses.requires_grad
    assert torch.equal(result.pair_weights, weigh(result.pair_losses))
    effective = (1 / result.pair_weights.square().sum(dim=1)).mean()
    torch.testing.assert_close(result.measurements["selection/effective_pairs"], effective)
    assert 1 < float(effective) < 6
    plain = method(views, None, None)
    assert plain.pair_weights is None
    assert "selection/effective_pairs" not in plain.measurements
    two = method(_views(name, num_views=2), None, None)
    assert two.pair_losses is None


def test_class_and_patch_parts_of_ibot_add_up_to_its_weighted_loss() -> None:
    method, views = _method("ibot", **_SETTINGS["ibot"]), _views("ibot")
    for weigh in (None, _softmax_weights(views)):
        result = method(views, None, weigh)
        parts = result.measurements
        torch.testing.assert_close(
            0.7 * parts["train/class_loss"] + 1.3 * parts["train/patch_loss"], result.loss.detach()
        )


def test_simclr_never_contrasts_the_views_of_one_image() -> None:
    """The loss of pair (0, 1) of an image has no gradient at its views 2 and 3, and one at theirs of other images."""
    z = F.normalize(torch.randn(4, 5, 8, dtype=torch.float64), dim=-1).requires_grad_()
    losses_BP = score_pairs(
        z, z, torch.from_numpy(pair_table(4)), first_image=0, temperature=0.1, negatives_of_all_views=True
    )
    (gradient,) = torch.autograd.grad(losses_BP[1, 0], z)
    is_touched = gradient.abs().amax(dim=2) > 0
    expected = torch.ones(4, 5, dtype=torch.bool)
    expected[2:, 1] = False
    assert torch.equal(is_touched, expected)


def test_simclr_gains_nothing_by_repelling_equal_views_of_one_image() -> None:
    """Four equal views of each of two orthogonal images: only the eight orthogonal negatives are left of the loss."""
    z = torch.eye(2, dtype=torch.float64)[None].expand(4, 2, 2).clone()
    losses_BP = score_pairs(
        z, z, torch.from_numpy(pair_table(4)), first_image=0, temperature=1.0, negatives_of_all_views=True
    )
    torch.testing.assert_close(losses_BP, torch.full((2, 6), math.log((math.e + 4) / math.e), dtype=torch.float64))


@pytest.mark.parametrize("weighted", [False, True])
def test_parts_of_a_step_contrast_with_all_views_of_all_of_it(weighted: bool) -> None:
    whole = _method("simclr")
    parted = copy.deepcopy(whole)
    views = _views("simclr", num_images=6)
    weigh = _softmax_weights(views) if weighted else None
    loss = whole(views, None, weigh).loss
    loss.backward()
    parts = [dataclasses.replace(views, global_views=views.global_views[:, start : start + 2]) for start in (0, 2, 4)]
    with torch.no_grad():
        features = torch.stack([parted.contrast_features(part) for part in parts])
    for index, part in enumerate(parts):
        of_part = parted(part, Contrast(features=features, part=index), weigh)
        torch.testing.assert_close(of_part.loss, loss)
        assert of_part.pair_losses.shape == (2, 6)
        (of_part.loss / 3).backward()
    for (name, mine), theirs in zip(parted.named_parameters(), whole.parameters(), strict=True):
        small = max(1e-6, 1e-4 * float(theirs.grad.abs().max()))  # rounding differs between processors
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=small, msg=name)


@pytest.mark.parametrize("alternating", [False, True])
def test_averaged_target_is_fastsiams(alternating: bool) -> None:
    method, views = _method("simsiam", averaged_target=True), _views("simsiam", alternating=alternating)
    twin = copy.deepcopy(method)
    outputs = _outputs("simsiam", twin, views)
    terms = []
    for image, view in itertools.product(range(IMAGES), range(4)):
        others = [v for v in range(4) if v != view and not (alternating and v % 2 == view % 2)]
        target = sum(outputs["projections"][v, image].detach() for v in others) / len(others)
        terms.append(-_cosine(outputs["predictions"][view, image], target))
    expected = sum(terms) / len(terms)
    result = method(views)
    assert result.pair_losses is None
    torch.testing.assert_close(result.loss, expected)
    result.loss.backward()
    expected.backward()
    for (key, mine), theirs in zip(method.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=key)


def test_averaged_target_of_two_views_is_simsiam_to_the_bit() -> None:
    views = _views("simsiam", num_views=2)
    assert torch.equal(_method("simsiam", averaged_target=True)(views).loss, _method("simsiam")(views).loss)


def test_each_slot_of_simsiam_has_its_own_batch_statistics() -> None:
    """In training mode the loss of four slots is the mean over the losses of its pairs, each trained on alone."""
    method, views = _method("simsiam").train(), _views("simsiam", num_images=6)
    alone = [method(ViewTensors(global_views=views.global_views[pair])).loss for pair in pair_table(4).tolist()]
    torch.testing.assert_close(method(views).loss, torch.stack(alone).mean())
