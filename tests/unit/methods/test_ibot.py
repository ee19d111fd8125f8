"""iBOT: patch loss against lightly's, scores against the reference's formula, masks bound to their views."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss

from hvp_ray.errors import ConfigError, ShapeError
from hvp_ray.methods.backbones import forward_tokens
from hvp_ray.methods.ibot import IBot
from hvp_ray.methods.method import StepPosition, ViewTensors, build_method
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import Candidates, choose_views, score_views
from tests.helpers import slow_cross_entropy, slow_dino_score

K = 24
CANDIDATES = Candidates(num_views=4, num_local_views=3, num_chosen_local_views=2, alternating=True)


def _method(**options: object) -> IBot:
    config = get_recipe("ibot-digits").method
    backbone = dataclasses.replace(config.backbone, dim=32, depth=2, num_heads=2)
    temperatures = {"teacher_temperature": 0.04, "patch_teacher_temperature": 0.07, "warmup_patch_teacher_epochs": 9}
    settings = {"backbone": backbone, "num_prototypes": K} | temperatures | options
    method = build_method(dataclasses.replace(config, **settings))
    assert isinstance(method, IBot)
    with torch.no_grad():
        method.center.copy_(torch.randn(K) * 0.02)
        method.patch_center.copy_(torch.randn(K) * 0.02)
        method.mask_token.copy_(torch.randn(1, 32) * 0.1)
        for parameter in method.teacher_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return method.eval()  # no drop path, so that views can be forwarded one by one


def _views(num_views: int = 4, num_images: int = 3, max_masked: int | None = None) -> ViewTensors:
    masks = torch.rand(num_views, num_images, 4, 4) < 0.4
    masks[1, 0] = False
    return ViewTensors(
        global_views=torch.randn(num_views, num_images, 3, 16, 16),
        local_views=torch.randn(3, num_images, 3, 8, 8),
        masks=masks,
        max_masked_patches=max_masked,
    )


def _outputs(method: IBot, views: ViewTensors) -> dict[str, torch.Tensor]:
    """Logits of all tokens, view by view: teacher without masks, student with them, [G, B, 17, K]; local views [L, B, K]."""
    assert views.masks is not None
    assert views.local_views is not None
    with torch.no_grad():
        teacher = [
            method.teacher_head.logits(method.teacher_head(forward_tokens(method.teacher_backbone, v)))
            for v in views.global_views
        ]
        student = [
            method.head.logits(method.head(forward_tokens(method.backbone, v, mask=m, mask_token=method.mask_token)))
            for v, m in zip(views.global_views, views.masks, strict=True)
        ]
        of_locals = [method.head.logits(method.head(method.backbone(v))) for v in views.local_views]
    return {"teacher": torch.stack(teacher), "student": torch.stack(student), "locals": torch.stack(of_locals)}


def test_loss_equals_lightlys_two_losses() -> None:
    method, views = _method(), _views(num_views=2)
    assert views.masks is not None
    outputs = _outputs(method, views)
    of_class = DINOLoss(K, teacher_temp=0.04, student_temp=0.1)
    of_class.center.copy_(method.center[None, None])
    of_patches = IBOTPatchLoss(K, teacher_temp=0.04, student_temp=0.1)
    of_patches.center.center.copy_(method.patch_center[None])
    expected_class = of_class(list(outputs["teacher"][:, :, 0]), [*outputs["student"][:, :, 0], *outputs["locals"]])
    masks = views.masks.flatten(0, 1)
    expected_patches = of_patches(
        outputs["teacher"][:, :, 1:].flatten(0, 1)[masks.flatten(1)],
        outputs["student"][:, :, 1:].flatten(0, 1)[masks.flatten(1)],
        masks,
    )
    result = method(views)
    torch.testing.assert_close(result.measurements["train/class_loss"], expected_class)
    torch.testing.assert_close(result.measurements["train/patch_loss"], expected_patches)
    torch.testing.assert_close(result.loss.detach(), expected_class + expected_patches)
    torch.testing.assert_close(result.statistics["center"], outputs["teacher"][:, :, 0].mean(dim=(0, 1)))
    torch.testing.assert_close(result.statistics["patch_center"], outputs["teacher"][:, :, 1:].mean(dim=(0, 1, 2)))


def test_entropy_and_information_of_the_teachers_patches_are_those_of_masked_patches_of_the_first_view() -> None:
    method, views = _method(), _views(num_views=2)
    assert views.masks is not None
    logits = _outputs(method, views)["teacher"][0, :, 1:][views.masks[0].flatten(1)] - method.patch_center
    outputs = torch.softmax(logits.double() / 0.04, dim=-1).numpy()
    entropy = np.mean([-sum(p * np.log(p) for p in output if p > 0) for output in outputs])
    mean = outputs.mean(axis=0)
    found = method(views).measurements
    assert float(found["collapse/patch_teacher_entropy"]) == pytest.approx(entropy, rel=1e-4)
    information = -(mean * np.log(mean)).sum() - entropy
    assert float(found["collapse/patch_teacher_information"]) == pytest.approx(information, rel=1e-4)
    unmasked = dataclasses.replace(views, masks=torch.zeros(2, 3, 4, 4, dtype=torch.bool))
    assert method(unmasked).measurements["collapse/patch_teacher_entropy"].isnan()


@pytest.mark.parametrize("scoring", ["full", "class"])
def test_scores_equal_the_references_formula(scoring: str) -> None:
    method, views = _method(scoring=scoring, class_weight=0.7, patch_weight=1.3), _views()
    assert views.masks is not None
    outputs = {name: value.double().numpy() for name, value in _outputs(method, views).items()}
    centers = method.center.double().numpy(), method.patch_center.double().numpy()
    masks = views.masks.flatten(2).numpy()

    def of_class(t: np.ndarray, s: np.ndarray) -> float:
        return slow_cross_entropy(t, s, centers[0], 0.04, 0.1)

    def patch_term(view: int, image: int) -> float:
        masked = np.flatnonzero(masks[view, image])
        terms = [
            slow_cross_entropy(
                outputs["teacher"][view, image, 1 + p], outputs["student"][view, image, 1 + p], centers[1], 0.04, 0.1
            )
            for p in masked
        ]
        return sum(terms) / max(1, len(terms))

    scores = score_views(method.score, views, CANDIDATES, module=method)
    selection = choose_views("hardest", CANDIDATES, num_images=3, device=torch.device("cpu"), scores=scores)
    assert selection.scores is not None
    for image in range(3):
        student = np.concatenate([outputs["student"][:, image, 0], outputs["locals"][:, image]])
        tuples = {}
        for pair in CANDIDATES.pairs.tolist():
            patches = sum(patch_term(view, image) for view in pair) / 2 if scoring == "full" else 0.0
            for of_locals in itertools.combinations(range(3), 2):
                score = slow_dino_score(outputs["teacher"][:, image, 0], student, tuple(pair), of_locals, of_class)
                tuples[tuple(pair), of_locals] = 0.7 * score + 1.3 * patches
        hardest = max(tuples, key=lambda key: tuples[key])
        assert float(selection.scores[image]) == pytest.approx(tuples[hardest], rel=1e-5)
        assert tuple(selection.view_indices[:, image].tolist()) == hardest[0]


def test_bound_on_masked_patches_changes_nothing_but_work() -> None:
    method, views = _method(), _views(num_views=2)
    assert views.masks is not None
    bound = int(views.masks.flatten(2).sum(dim=2).max())
    bounded = dataclasses.replace(views, max_masked_patches=bound)
    torch.testing.assert_close(method(bounded).loss, method(views).loss)


def test_unmasked_view_has_no_patch_loss_and_the_mask_hides_the_pixels() -> None:
    method, views = _method(), _views(num_views=2)
    unmasked = dataclasses.replace(views, masks=torch.zeros(2, 3, 4, 4, dtype=torch.bool))
    assert float(method(unmasked).measurements["train/patch_loss"]) == 0.0
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    image = torch.randn(1, 3, 16, 16)
    changed = image.clone()
    changed[:, :, 4:8, 8:12] += 5.0  # the pixels of patch (1, 2)

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        return forward_tokens(method.backbone, pixels, mask=mask, mask_token=method.mask_token)

    assert torch.equal(tokens(image), tokens(changed))
    assert not torch.equal(forward_tokens(method.backbone, image), forward_tokens(method.backbone, changed))


def test_temperatures_and_patch_centre_follow_their_schedules() -> None:
    method = _method(warmup_patch_teacher_epochs=4)
    temperatures = []
    for epoch in range(5):
        method.begin_step(StepPosition(step=epoch * 3, num_steps=30, steps_per_epoch=3))
        temperatures.append(float(method.patch_teacher_temperature))
        assert float(method.teacher_temperature) == pytest.approx(0.04)
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])
    before = method.patch_center.clone()
    method.after_update({"center": torch.zeros(K), "patch_center": torch.ones(K)})
    torch.testing.assert_close(method.patch_center, 0.9 * before + 0.1)


def test_resnets_and_missing_masks_are_refused() -> None:
    config = get_recipe("ibot-digits").method
    resnet = dataclasses.replace(get_recipe("simsiam-digits").method.backbone)
    with pytest.raises(ConfigError, match="needs a Vision Transformer"):
        build_method(dataclasses.replace(config, backbone=resnet))
    without_class_token = dataclasses.replace(config.backbone, name="vit_medium_patch16_gap_256")
    with pytest.raises(ConfigError, match="loss on the class token"):
        build_method(dataclasses.replace(config, backbone=without_class_token))
    with pytest.raises(ShapeError, match="needs the masks"):
        _method()(dataclasses.replace(_views(num_views=2), masks=None))
