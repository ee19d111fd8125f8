"""Several ranks equal one rank with the same global batch: value and gradient, BatchNorm included."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvp_ray.config import SimSiamConfig
from hvp_ray.distributed.batch_norm import convert_to_cpu_sync_batch_norm
from hvp_ray.distributed.world import World, mean_over_ranks
from hvp_ray.distributed.wrap import synchronize_batch_norm, wrap_for_training
from hvp_ray.errors import ConfigError
from hvp_ray.methods.method import build_method
from hvp_ray.recipes import get_recipe
from hvp_ray.selection import score_views
from tests.distributed.processes import run_ranks

pytestmark = pytest.mark.distributed


def _method() -> nn.Module:
    config = get_recipe("simsiam-digits").method
    assert isinstance(config, SimSiamConfig)
    torch.manual_seed(0)
    backbone = dataclasses.replace(config.backbone, channels=(4, 8, 8, 16))
    return build_method(dataclasses.replace(config, backbone=backbone, projector_dim=16)).train()


def _slots() -> torch.Tensor:
    return torch.randn(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _one_update(rank: int, num_ranks: int) -> dict[str, Any]:
    """Two updates; return the losses, the gradients of the last one, scores, and the state."""
    method = _method()
    world, device = World(rank=rank, num_ranks=num_ranks), torch.device("cpu")
    method = synchronize_batch_norm(method, world, device)
    wrapped, reduce_gradients = wrap_for_training(method, world, device)
    per_rank = 12 // num_ranks
    slots = _slots()[:, rank * per_rank : (rank + 1) * per_rank]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    scores = score_views(method.score, slots, module=method, batch_norm="batch")
    losses = []
    for _ in range(2):
        loss = wrapped(slots).loss
        losses.append(float(mean_over_ranks(loss.detach())))
        optimizer.zero_grad()
        loss.backward()
        reduce_gradients()
        optimizer.step()
    return {
        "losses": losses,
        "scores": scores.numpy(),
        "gradients": {name: p.grad.numpy() for name, p in method.named_parameters()},
        "state": {name: value.numpy() for name, value in method.state_dict().items()},
    }


@pytest.mark.parametrize(("num_ranks", "tolerance"), [(2, 1e-5), (3, 3e-5)])
def test_ranks_equal_one_rank_in_value_and_gradient(num_ranks: int, tolerance: float) -> None:
    ranks = run_ranks(_one_update, num_ranks)
    single = _one_update(0, 1)
    np.testing.assert_allclose(ranks[0]["losses"], single["losses"], atol=tolerance)
    np.testing.assert_allclose(np.concatenate([r["scores"] for r in ranks]), single["scores"], atol=tolerance)
    for name, gradient in single["gradients"].items():
        np.testing.assert_allclose(ranks[0]["gradients"][name], gradient, atol=tolerance, err_msg=name)
    for name, value in single["state"].items():
        np.testing.assert_allclose(ranks[0]["state"][name], value, atol=tolerance, err_msg=name)
    for other in ranks[1:]:
        for name, gradient in other["gradients"].items():
            assert np.array_equal(gradient, ranks[0]["gradients"][name]), name
        for name, value in other["state"].items():
            assert np.array_equal(value, ranks[0]["state"][name]), name


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


def test_unknown_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="BatchNorm3d"):
        convert_to_cpu_sync_batch_norm(nn.Sequential(nn.BatchNorm3d(2)), 2)
