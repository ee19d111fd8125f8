"""SimCLR: loss against lightly's, scores against the paper's loop, the contrast set of accumulated gradients."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss

from hvp_ray.methods.method import Contrast, ViewTensors, build_method
from hvp_ray.methods.simclr import nt_xent, score_pairs
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import Candidates, pair_table
from tests.helpers import slow_nt_xent_scores


def _scores(views: torch.Tensor, **options: bool) -> torch.Tensor:
    unit = F.normalize(views, dim=-1)
    return score_pairs(unit, unit, torch.from_numpy(pair_table(len(views))), first_image=0, temperature=0.1, **options)


def test_loss_and_gradient_equal_lightlys() -> None:
    z = torch.randn(2, 9, 16, dtype=torch.float64)
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    unit = F.normalize(mine, dim=-1)
    loss = nt_xent(unit, unit, first_image=0, temperature=0.1)
    expected = NTXentLoss(temperature=0.1)(theirs[0], theirs[1])
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("all_negatives", [False, True])
def test_scores_equal_the_papers_loop(all_negatives: bool, generator: np.random.Generator) -> None:
    views = generator.normal(size=(4, 7, 5))
    scores = _scores(torch.from_numpy(views), negatives_of_all_views=all_negatives)
    for column, pair in enumerate(pair_table(4).tolist()):
        expected = slow_nt_xent_scores(views, tuple(pair), 0.1, all_negatives=all_negatives)
        np.testing.assert_allclose(scores[:, column].numpy(), expected, rtol=1e-10)


def test_mean_score_of_the_only_pair_is_the_loss() -> None:
    unit = F.normalize(torch.randn(2, 9, 16), dim=-1)
    for options in ({}, {"negatives_of_all_views": True}):
        torch.testing.assert_close(_scores(unit, **options).mean(), nt_xent(unit, unit, first_image=0, temperature=0.1))


def test_scores_and_loss_are_the_same_under_autocast() -> None:
    """Nearly equal views: in bfloat16 their similarities would be ties."""
    unit = F.normalize(torch.randn(1, 32, 64) + 0.02 * torch.randn(4, 32, 64), dim=-1)
    scores, loss = _scores(unit), nt_xent(unit[:2], unit[:2], first_image=0, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_scores(unit), scores)
        assert torch.equal(nt_xent(unit[:2], unit[:2], first_image=0, temperature=0.1), loss)


def test_score_of_a_hand_computed_pair() -> None:
    """One image has no negatives, so its loss is 0; two orthogonal images have two negatives of similarity 0 each."""
    assert _scores(torch.ones(2, 1, 3)).tolist() == [[pytest.approx(0.0, abs=1e-6)]]
    axes = torch.eye(2)[None].expand(2, 2, 2)
    expected = -np.log(np.exp(10) / (np.exp(10) + 2))
    assert _scores(axes).tolist() == [[pytest.approx(expected, rel=1e-2)]] * 2


def test_identical_views_are_easiest_and_scores_permute_with_the_views() -> None:
    views = torch.randn(4, 6, 8)
    views[2] = views[0]
    scores = _scores(views)
    same = pair_table(4).tolist().index([0, 2])
    assert (scores.argmin(dim=1) == same).all()
    permuted = _scores(views[[1, 0, 2, 3]])
    torch.testing.assert_close(permuted[:, 0], scores[:, 0])
    torch.testing.assert_close(permuted[:, 1], scores[:, pair_table(4).tolist().index([1, 2])])


def test_method_scores_what_it_would_lose() -> None:
    """For every pair: the score, averaged over images, is the loss of training on that pair (BatchNorm frozen)."""
    method = build_method(get_recipe("simclr-digits").method).eval()
    views = torch.randn(4, 6, 3, 8, 8)
    scores = method.score(ViewTensors(global_views=views), Candidates(num_views=4)).pairs_BP
    for column, pair in enumerate(pair_table(4).tolist()):
        loss = method(ViewTensors(global_views=views[pair])).loss
        torch.testing.assert_close(scores[:, column].mean(), loss)


def test_parts_of_a_step_contrast_with_all_of_it() -> None:
    """The mean over parts of their losses has value and gradient of the whole step's loss (BatchNorm frozen)."""
    config = get_recipe("simclr-digits").method
    whole, parted = (build_method(config).eval() for _ in range(2))
    parted.load_state_dict(whole.state_dict())
    views = torch.randn(2, 6, 3, 8, 8)
    loss = whole(ViewTensors(global_views=views)).loss
    loss.backward()
    parts = [ViewTensors(global_views=views[:, start : start + 2]) for start in (0, 2, 4)]
    with torch.no_grad():
        features = torch.stack([parted.contrast_features(part) for part in parts])
    for index, part in enumerate(parts):
        of_part = parted(part, Contrast(features=features, part=index)).loss
        torch.testing.assert_close(of_part, loss)
        (of_part / 3).backward()
    for (name, mine), theirs in zip(parted.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_projector_is_that_of_the_reference() -> None:
    method = build_method(dataclasses.replace(get_recipe("simclr-imagenet-r50-100ep").method))
    linear = [m for m in method.projector if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias) for m in linear] == [(2048, 2048, None), (2048, 128, None)]
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in method.projector) == 2
