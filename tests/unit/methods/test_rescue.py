"""Rescue: all candidates of the easiest images, the first pair of the others, and no forward beyond their views."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvp_ray.methods.method import ALONE, Method, Ranks, ViewTensors, build_method
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import Candidates, CandidateScores, choose_views, easiest_images

METHODS = ("simsiam", "simclr", "dino", "ibot")
MULTI_CROP = ("dino", "ibot")
IMAGES = 8
TEMPERATURE = get_recipe("simclr-digits").method.temperature
VIT = dataclasses.replace(get_recipe("ibot-digits").method.backbone, dim=16, depth=2, num_heads=2, drop_path=0.0)


def frozen_method(name: str, ranks: Ranks = ALONE, **settings: Any) -> Method:
    """Build a method without drop path; BatchNorm is frozen."""
    config = get_recipe(f"{name}-digits").method
    torch.manual_seed(0)
    return build_method(dataclasses.replace(config, backbone=VIT, **settings), ranks).eval()


def candidates_of(name: str, share: float = 1.0, num_views: int = 4) -> Candidates:
    of_locals = {"num_local_views": 3, "num_chosen_local_views": 2, "alternating": True} if name in MULTI_CROP else {}
    return Candidates(num_views=num_views, rescue_share=share, **of_locals)


def views_of(name: str, num_images: int = IMAGES) -> ViewTensors:
    torch.manual_seed(1)
    return ViewTensors(
        global_views=torch.randn(4, num_images, 3, 16, 16),
        local_views=torch.randn(3, num_images, 3, 8, 8) if name in MULTI_CROP else None,
        masks=torch.rand(4, num_images, 4, 4) < 0.4 if name == "ibot" else None,
    )


def _easiest_by_hand(first_pair: CandidateScores, share: float) -> list[int]:
    hardest = first_pair.best_of_pairs(2)[:, 0].tolist()
    return sorted(sorted(range(len(hardest)), key=hardest.__getitem__)[: round(share * len(hardest))])


def test_the_easiest_are_chosen_in_order_and_of_equals_the_first() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 1.0])
    assert [easiest_images(scores, count).tolist() for count in range(4)] == [[], [4], [1, 4], [1, 3, 4]]
    assert easiest_images(scores, 6).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["simsiam", "dino", "ibot"])
def test_losses_of_single_images_are_those_of_scoring_everything(name: str) -> None:
    method, views, forwarded = frozen_method(name), views_of(name), []
    with torch.no_grad():
        full = method.score(views, candidates_of(name))
        of_pair = method.score(views.first_pair(), candidates_of(name, num_views=2))
        method.backbone.patch_embed.register_forward_hook(lambda _, inputs, __: forwarded.append(len(inputs[0])))
        found = method.score(views, candidates_of(name, share=0.5))
    of_locals = [3 * IMAGES] if name in MULTI_CROP else []
    assert forwarded == [2 * IMAGES, *of_locals, 2 * (IMAGES // 2)]
    rescued = _easiest_by_hand(of_pair, 0.5)
    assert 0 < len(rescued) < IMAGES
    others = sorted(set(range(IMAGES)) - set(rescued))
    torch.testing.assert_close(found.pairs_BP[rescued], full.pairs_BP[rescued])
    torch.testing.assert_close(found.pairs_BP[others, 0], full.pairs_BP[others, 0])
    assert (found.pairs_BP[others, 1:] == -torch.inf).all()
    assert found.is_scored_BP[rescued].all()
    if name in MULTI_CROP:
        torch.testing.assert_close(found.locals_BPL[rescued], full.locals_BPL[rescued])
        torch.testing.assert_close(found.locals_BPL[others, 0], full.locals_BPL[others, 0])
    assert found.reusable.keys() == full.reusable.keys() != (set() if name in MULTI_CROP else None)
    for key, of_views in full.reusable.items():
        torch.testing.assert_close(found.reusable[key][:, rescued], of_views[:, rescued])
        torch.testing.assert_close(found.reusable[key][:2], of_views[:2])


@pytest.mark.parametrize("name", METHODS)
def test_the_ends_of_the_share_are_all_candidates_and_the_first_pair_to_the_bit(name: str) -> None:
    """0.99 rescues every image, in two rounds."""
    method, views = frozen_method(name), views_of(name)
    with torch.no_grad():
        full, two_rounds = (method.score(views, candidates_of(name, share)) for share in (1.0, 0.99))
        of_pair = method.score(views.first_pair(), candidates_of(name, num_views=2))
        no_rescue = method.score(views, candidates_of(name, share=0.0))
    assert torch.equal(two_rounds.pairs_BP, full.pairs_BP)
    assert torch.equal(no_rescue.pairs_BP[:, :1], of_pair.pairs_BP)
    assert (no_rescue.pairs_BP[:, 1:] == -torch.inf).all()
    if name in MULTI_CROP:
        assert torch.equal(two_rounds.locals_BPL, full.locals_BPL)
        assert torch.equal(no_rescue.locals_BPL[:, :1], of_pair.locals_BPL)
    for key, of_views in full.reusable.items():
        assert torch.equal(two_rounds.reusable[key], of_views)


def test_images_that_are_not_rescued_are_trained_on_their_first_pair() -> None:
    name = "dino"
    method, views, candidates = frozen_method(name), views_of(name), candidates_of(name, share=0.5)
    with torch.no_grad():
        scores = method.score(views, candidates)
    chosen = choose_views("hardest", candidates, num_images=IMAGES, device=torch.device("cpu"), scores=scores)
    others = ~scores.is_scored_BP.all(dim=1)
    assert others.sum() == IMAGES // 2
    assert (chosen.pair_indices[others] == 0).all()
    expected = scores.locals_BPL[others, 0].topk(2, dim=1).indices.sort(dim=1).values
    assert torch.equal(chosen.local_indices[:, others].T, expected)
    mean = scores.mean(2)
    for image in others.nonzero().flatten().tolist():
        by_hand = scores.pairs_BP[image, 0] + 2 * scores.locals_BPL[image, 0].mean()
        torch.testing.assert_close(mean[image], by_hand)


def _slow_rescued_score(
    views: NDArray[np.float64],
    image: int,
    pair: tuple[int, int],
    images_of_view: Callable[[int], list[int]],
    *,
    all_negatives: bool,
) -> float:
    """SimCLR's loss of a pair, [V, N, D]; forwarded negatives of a view weigh as much as those of all images would."""
    num_views, num_images, _ = views.shape

    def similarity(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return math.exp(float(a @ b) / (float(np.linalg.norm(a)) * float(np.linalg.norm(b))) / TEMPERATURE)

    directions = []
    for anchor, other in (pair, pair[::-1]):
        denominator = positive = similarity(views[anchor, image], views[other, image])
        for v in range(num_views) if all_negatives else pair:
            negatives = [j for j in images_of_view(v) if j != image]
            weight = (num_images - 1) / max(1, len(negatives))
            denominator += weight * sum(similarity(views[anchor, image], views[v, j]) for j in negatives)
        directions.append(-math.log(positive / denominator))
    return sum(directions) / 2


def check_simclr(found: Tensor, projections: Tensor, rescued: list[int], *, all_negatives: bool) -> None:
    views = projections.double().numpy()
    num_images = views.shape[1]
    for image in range(num_images):
        if image not in rescued:
            expected = _slow_rescued_score(
                views[:2], image, (0, 1), lambda _: list(range(num_images)), all_negatives=all_negatives
            )
            assert found[image, 0] == pytest.approx(expected, rel=1e-4)
            assert (found[image, 1:] == -torch.inf).all()
            continue
        for column, pair in enumerate(Candidates(num_views=4).pairs.tolist()):
            expected = _slow_rescued_score(
                views,
                image,
                tuple(pair),
                lambda v: list(range(num_images)) if v < 2 else rescued,
                all_negatives=all_negatives,
            )
            assert found[image, column] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("negatives", ["pair", "all"])
@pytest.mark.parametrize("share", [0.5, 1 / 8])
def test_scores_of_simclr_equal_a_loop(negatives: str, share: float) -> None:
    """With one rescued image, its views 2 and 3 have no negatives among themselves."""
    method, views = frozen_method("simclr", scoring_negatives=negatives), views_of("simclr")
    with torch.no_grad():
        of_pair = method.score(views.first_pair(), Candidates(num_views=2))
        found = method.score(views, Candidates(num_views=4, rescue_share=share)).pairs_BP
        projections = method.embed(views).of_globals["projections"]
    check_simclr(found, projections, _easiest_by_hand(of_pair, share), all_negatives=negatives == "all")
