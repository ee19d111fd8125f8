"""SimSiam: scores and loss against the formula, by hand and by loop."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hvp_ray.errors import ShapeError
from hvp_ray.methods import simsiam
from hvp_ray.methods.method import ViewTensors, build_method
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import pair_table


def score_pairs(projections: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    return simsiam.score_pairs(projections, predictions, torch.from_numpy(pair_table(projections.shape[0])))


def _loss(method: torch.nn.Module, slots: torch.Tensor) -> torch.Tensor:
    return method(ViewTensors(global_views=slots)).loss


def test_score_of_a_hand_computed_pair() -> None:
    z = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    p = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    # cos(p0, z1) = 0.8, cos(p1, z0) = 1.0
    assert score_pairs(z, p).tolist() == [[pytest.approx(-0.9)]]


def test_scores_do_not_depend_on_scale_and_permute_with_the_views(generator: np.random.Generator) -> None:
    z, p = (torch.from_numpy(generator.normal(size=(4, 7, 9))).float() for _ in range(2))
    scores = score_pairs(z, p)
    torch.testing.assert_close(score_pairs(3 * z, 0.1 * p), scores)
    order = [2, 0, 3, 1]
    permuted = score_pairs(z[order], p[order])
    columns = {tuple(pair): column for column, pair in enumerate(pair_table(4).tolist())}
    for column, (m, n) in enumerate(pair_table(4).tolist()):
        original = columns[tuple(sorted((order[m], order[n])))]
        torch.testing.assert_close(permuted[:, column], scores[:, original])
    assert scores.abs().max() <= 1.0


def test_identical_views_score_lowest() -> None:
    z = torch.randn(1, 5, 8).repeat(3, 1, 1)
    torch.testing.assert_close(score_pairs(z, z), torch.full((5, 3), -1.0))


def test_one_view_makes_no_pair() -> None:
    with pytest.raises(ShapeError, match="two views"):
        score_pairs(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))


def test_loss_is_vanilla_simsiam_with_views_forwarded_separately() -> None:
    method = build_method(get_recipe("simsiam-digits").method).train()
    slots = torch.randn(2, 6, 3, 8, 8)
    twin = copy.deepcopy(method)
    z1, z2 = twin.projector(twin.backbone(slots[0])), twin.projector(twin.backbone(slots[1]))
    p1, p2 = twin.predictor(z1), twin.predictor(z2)
    expected = -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2
    loss = _loss(method, slots)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    loss.backward()
    expected.backward()
    for mine, theirs in zip(method.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    for name, value in method.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_loss_of_several_slots_is_the_mean_over_all_pairs() -> None:
    method = build_method(get_recipe("simsiam-digits").method).eval()
    slots = torch.randn(3, 4, 3, 8, 8)
    pairs = [_loss(method, slots[list(pair)]) for pair in pair_table(3).tolist()]
    torch.testing.assert_close(_loss(method, slots), torch.stack(pairs).mean())


def test_projector_and_predictor_are_those_of_the_paper() -> None:
    config = dataclasses.replace(get_recipe("simsiam-imagenet-r50-100ep").method)
    method = build_method(config)
    linear = [m for m in method.projector if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(2048, 2048)] * 3
    assert all(m.bias is None for m in linear)
    assert not method.projector[-1].affine
    assert [m.out_features for m in method.predictor if isinstance(m, torch.nn.Linear)] == [512, 2048]
    last_norms = [m.weight for name, m in method.backbone.named_modules() if name.endswith("bn3")]
    assert all(not weight.any() for weight in last_norms)  # zero-init residual
    assert len(last_norms) == 16
