"""Several ranks equal one rank with the same global batch: value and gradient, BatchNorm included."""

import copy
import dataclasses
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import LayerScale
from torch import nn

from hvp_ray.config import SelectionConfig
from hvp_ray.distributed.batch_norm import convert_to_cpu_sync_batch_norm
from hvp_ray.distributed.world import World, gather_over_ranks, mean_over_ranks
from hvp_ray.distributed.wrap import synchronize_batch_norm, wrap_for_training
from hvp_ray.errors import ConfigError
from hvp_ray.methods.method import Contrast, Method, Ranks, StepPosition, ViewTensors, build_method
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import Candidates, PairWeighting, Selection, gather_reusable, pair_weights_of, score_views
from tests.distributed.processes import run_ranks

pytestmark = pytest.mark.distributed


METHODS = ("simsiam", "simclr", "dino", "ibot", "dinov2")
MASKED = ("ibot", "dinov2")
IMAGES = 12
CPU = torch.device("cpu")


def _method(name: str, ranks: Ranks, **settings: Any) -> Method:
    """Build a small network of the method, without drop path, which every rank draws for itself."""
    config = get_recipe(f"{name}-digits").method
    torch.manual_seed(0)
    transformer = {"dim": 16, "depth": 2, "num_heads": 2, "drop_path": 0.0}
    small = transformer if name in MASKED else {"channels": (4, 8, 8, 16)}
    backbone = dataclasses.replace(config.backbone, **small)
    method = build_method(dataclasses.replace(config, backbone=backbone, **settings), ranks).train()
    for layer in method.modules():
        if isinstance(layer, LayerScale):
            nn.init.constant_(layer.gamma, 0.5)  # 1e-5 at the start makes all class tokens neighbours at distance 0
    return method


def _candidates(name: str, device: torch.device = CPU) -> tuple[ViewTensors, Candidates]:
    """Draw the candidate views of the global batch."""
    generator = torch.Generator().manual_seed(1)

    def draw(num_views: int, size_px: int) -> torch.Tensor:
        return torch.randn(num_views, IMAGES, 3, size_px, size_px, generator=generator).to(device)

    if name not in ("dino", *MASKED):
        return ViewTensors(global_views=draw(3, 8)), Candidates(num_views=3)
    masks = torch.rand(4, IMAGES, 4, 4, generator=generator).to(device) < 0.3
    views = ViewTensors(
        global_views=draw(4, 16),
        local_views=draw(3, 8),
        masks=masks if name in MASKED else None,
    )
    return views, Candidates(num_views=4, num_local_views=3, num_chosen_local_views=2, alternating=True)


def _part(views: ViewTensors, images: slice, num_views: int | None = None) -> ViewTensors:
    return ViewTensors(
        global_views=views.global_views[:num_views, images],
        local_views=None if views.local_views is None else views.local_views[:num_views, images],
        masks=None if views.masks is None else views.masks[:num_views, images],
    )


def two_updates(rank: int, num_ranks: int, device_type: str = "cpu") -> dict[str, dict[str, Any]]:
    """Return for each method scores, the losses of two updates, the gradients of the last one, and the state."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    return {name: two_updates_of(name, rank, num_ranks, device) for name in METHODS}


def two_updates_with_rows(rank: int, num_ranks: int) -> dict[str, Any]:
    """Return that of iBOT, whose training takes the students' rows from scoring."""
    return two_updates_of("ibot", rank, num_ranks, reuse_student=True)


def two_updates_of(
    name: str, rank: int, num_ranks: int, device: torch.device = CPU, *, reuse_student: bool = False
) -> dict[str, Any]:
    world = World(rank=rank, num_ranks=num_ranks)
    method = synchronize_batch_norm(_method(name, Ranks(rank=rank, gather=gather_over_ranks)), world, device)
    assert isinstance(method, Method)
    method = method.to(device)
    wrapped = wrap_for_training(method, world, device)
    images = slice(rank * IMAGES // num_ranks, (rank + 1) * IMAGES // num_ranks)
    views, candidates = _candidates(name, device)
    scores = score_views(method.score, _part(views, images), candidates, module=method, batch_norm="batch")
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    losses = []
    for step in range(2):
        method.begin_step(StepPosition(step=step, num_steps=2, steps_per_epoch=1))
        trained_on = _part(views, images, num_views=2)
        if reuse_student:
            kept = method.score(dataclasses.replace(_part(views, images), keep_rows=True), candidates).reusable
            first_two = torch.arange(2)[:, None].expand(2, trained_on.global_views.shape[1])
            selection = Selection(pair_indices=None, view_indices=first_two, local_indices=first_two)
            trained_on = dataclasses.replace(trained_on, reusable=gather_reusable(kept, selection))
        result = wrapped.forward(trained_on)
        losses.append(float(mean_over_ranks(result.loss.detach())))
        optimizer.zero_grad()
        result.loss.backward()
        wrapped.reduce_gradients()
        method.before_update()
        optimizer.step()
        method.after_update({key: mean_over_ranks(value) for key, value in result.statistics.items()})
    return {
        "losses": losses,
        "scores": scores.pairs_BP.cpu().numpy(),
        "local scores": None if scores.locals_BPL is None else scores.locals_BPL.cpu().numpy(),
        "gradients": {key: p.grad.cpu().numpy() for key, p in method.named_parameters() if p.grad is not None},
        "state": {key: value.cpu().numpy() for key, value in method.state_dict().items()},
    }


@pytest.mark.parametrize(("num_ranks", "tolerance"), [(2, 2e-5), (3, 5e-5)])
def test_ranks_equal_one_rank_in_value_and_gradient(num_ranks: int, tolerance: float) -> None:
    check_ranks_equal_one(run_ranks(two_updates, num_ranks), CPU, tolerance)


@pytest.mark.parametrize(("num_ranks", "tolerance"), [(2, 2e-5), (3, 5e-5)])
def test_ranks_that_reuse_the_students_rows_equal_one_rank_that_does_not(num_ranks: int, tolerance: float) -> None:
    single = two_updates_of("ibot", 0, 1)
    for of_rank in run_ranks(two_updates_with_rows, num_ranks):
        np.testing.assert_allclose(of_rank["losses"], single["losses"], rtol=tolerance)
        assert of_rank["gradients"].keys() == single["gradients"].keys()
        for key, gradient in single["gradients"].items():
            scale = max(float(np.abs(gradient).max()), 1e-3)
            np.testing.assert_allclose(of_rank["gradients"][key], gradient, atol=tolerance * scale, err_msg=key)


def check_ranks_equal_one(ranks: list[dict[str, dict[str, Any]]], device: torch.device, tolerance: float) -> None:
    for name in METHODS:
        single, first = two_updates_of(name, 0, 1, device), ranks[0][name]
        np.testing.assert_allclose(first["losses"], single["losses"], atol=tolerance)
        for kind in ("scores", "local scores"):
            if single[kind] is not None:
                together = np.concatenate([of_rank[name][kind] for of_rank in ranks])
                np.testing.assert_allclose(together, single[kind], atol=tolerance, err_msg=f"{name} {kind}")
        assert first["gradients"].keys() == single["gradients"].keys()
        for kind in ("gradients", "state"):
            for key, value in single[kind].items():
                np.testing.assert_allclose(
                    first[kind][key], value, rtol=tolerance, atol=tolerance, err_msg=f"{name} {key}"
                )
        for other in ranks[1:]:
            for kind in ("gradients", "state"):
                for key, value in other[name][kind].items():
                    assert np.array_equal(value, first[kind][key]), f"{name} {key}"


WEIGHTED = SelectionConfig(rule="all_pairs", weighting="softmax")


def _all_pairs(rank: int, num_ranks: int) -> dict[str, dict[str, Any]]:
    """Return for each method, with and without weights, the loss on all pairs, its gradient, and the weights.

    BatchNorm is frozen. The last one is FastSiam.
    """
    images = slice(rank * IMAGES // num_ranks, (rank + 1) * IMAGES // num_ranks)
    arms = {f"{name} {kind}": (name, kind, {}) for name in METHODS for kind in ("mean", "weighted")}
    arms["fast-siam"] = ("simsiam", "mean", {"averaged_target": True})
    results = {}
    for arm, (name, kind, settings) in arms.items():
        method = _method(name, Ranks(rank=rank, gather=gather_over_ranks), **settings).eval()
        wrapped = wrap_for_training(method, World(rank=rank, num_ranks=num_ranks), CPU)
        views, candidates = _candidates(name)
        mine = dataclasses.replace(_part(views, images), alternating=candidates.alternating)
        weigh = pair_weights_of(WEIGHTED, mine.as_candidates(), device=CPU) if kind == "weighted" else None
        result = wrapped.forward(mine, None, weigh)
        result.loss.backward()
        wrapped.reduce_gradients()
        results[arm] = {
            "loss": float(mean_over_ranks(result.loss.detach())),
            "weights": None if result.pair_weights is None else result.pair_weights.numpy(),
            "gradients": {key: p.grad.numpy() for key, p in method.named_parameters() if p.grad is not None},
        }
    return results


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_equal_one_rank_on_all_pairs(num_ranks: int) -> None:
    ranks, alone = run_ranks(_all_pairs, num_ranks), _all_pairs(0, 1)
    for name, single in alone.items():
        first = ranks[0][name]
        np.testing.assert_allclose(first["loss"], single["loss"], rtol=1e-6, atol=1e-6)
        assert (single["weights"] is not None) == name.endswith("weighted")
        if single["weights"] is not None:
            together = np.concatenate([of_rank[name]["weights"] for of_rank in ranks])
            np.testing.assert_allclose(together, single["weights"], atol=1e-5, err_msg=name)
        assert first["gradients"].keys() == single["gradients"].keys()
        for key, value in single["gradients"].items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(first["gradients"][key], value, atol=2e-5 * scale, err_msg=f"{name} {key}")


def _gather_gradient(rank: int, num_ranks: int) -> torch.Tensor:
    """Weigh the parts of all ranks by a loss of each rank; return the gradient of the own part, which comes from all."""
    own = torch.full((2,), float(rank + 1), requires_grad=True)
    weights = torch.arange(1.0, num_ranks + 1) * (rank + 1)
    (gather_over_ranks(own) * weights[:, None]).sum().backward()
    assert own.grad is not None
    return own.grad


def test_gather_has_the_gradient_of_all_ranks_losses() -> None:
    for rank, gradient in enumerate(run_ranks(_gather_gradient, 2)):
        assert gradient.tolist() == [float((rank + 1) * (1 + 2))] * 2


def _accumulated(rank: int, num_ranks: int) -> dict[str, Any]:
    """Return gradients of SimCLR in one pass and in two parts, on one pair and on weighted pairs; BatchNorm is frozen."""
    views, _ = _candidates("simclr")
    mine = _part(views, slice(rank * 6, rank * 6 + 6))
    weigh = pair_weights_of(WEIGHTED, mine.as_candidates(), device=CPU)
    one_pair = dataclasses.replace(mine, global_views=mine.global_views[:2])
    return {
        f"{kind} {name}": of_parameter
        for kind, slots, weighing in (("one pair", one_pair, None), ("weighted pairs", mine, weigh))
        for name, of_parameter in _accumulated_on(slots, weighing, rank, num_ranks).items()
    }


def _accumulated_on(mine: ViewTensors, weigh: PairWeighting | None, rank: int, num_ranks: int) -> dict[str, Any]:
    gradients = []
    for num_parts in (1, 2):
        method = _method("simclr", Ranks(rank=rank, gather=gather_over_ranks)).eval()
        wrapped = wrap_for_training(method, World(rank=rank, num_ranks=num_ranks), torch.device("cpu"))
        parts = [_part(mine, slice(start, start + 6 // num_parts)) for start in range(0, 6, 6 // num_parts)]
        with torch.no_grad():
            features = torch.stack([method.contrast_features(part) for part in parts])
        for index, part in enumerate(parts):
            is_last = index == num_parts - 1
            with nullcontext() if is_last else wrapped.without_reduction():
                contrast = None if num_parts == 1 else Contrast(features=features, part=index)
                (wrapped.forward(part, contrast, weigh).loss / num_parts).backward()
        gradients.append({name: p.grad.numpy() for name, p in method.named_parameters()})
    return {name: (gradients[0][name], gradients[1][name]) for name in gradients[0]}


def test_parts_on_two_ranks_contrast_with_all_images_of_both() -> None:
    for of_rank in run_ranks(_accumulated, 2):
        for name, (whole, parted) in of_rank.items():
            np.testing.assert_allclose(parted, whole, rtol=1e-4, atol=2e-6, err_msg=name)


def _batch_norm_against_whole_batch(rank: int, num_ranks: int) -> dict[str, Any]:
    layer = nn.BatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 0.5]))
    whole = torch.randn(8, 3, 4, 5, generator=torch.Generator().manual_seed(2)) * 3 + 1
    synced = convert_to_cpu_sync_batch_norm(nn.Sequential(copy.deepcopy(layer)), num_ranks)
    part = whole[rank * 4 : rank * 4 + 4].clone().requires_grad_()
    (synced(part) ** 3).sum().backward()
    reference_input = whole.clone().requires_grad_()
    (layer(reference_input) ** 3).sum().backward()
    assert reference_input.grad is not None
    assert part.grad is not None
    return {
        "gradient_error": float((part.grad - reference_input.grad[rank * 4 : rank * 4 + 4]).abs().max()),
        "mean_error": float((synced[0].running_mean - layer.running_mean).abs().max()),
        "variance_error": float((synced[0].running_var - layer.running_var).abs().max()),
    }


def test_cpu_sync_batch_norm_is_the_whole_batch_in_gradient_and_running_statistics() -> None:
    for errors in run_ranks(_batch_norm_against_whole_batch, 2):
        assert errors["gradient_error"] < 1e-4
        assert errors["mean_error"] < 1e-6
        assert errors["variance_error"] < 1e-6


def test_frozen_batch_norm_stays_frozen() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(4, affine=False), nn.BatchNorm2d(2))
    network[0].requires_grad_(requires_grad=False)
    synced = convert_to_cpu_sync_batch_norm(network, 2)
    assert [parameter.requires_grad for parameter in synced.parameters()] == [False, False, True, True]


def test_unknown_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="BatchNorm3d"):
        convert_to_cpu_sync_batch_norm(nn.Sequential(nn.BatchNorm3d(2)), 2)
