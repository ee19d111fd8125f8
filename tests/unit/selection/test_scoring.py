"""The scoring pass leaves no trace, in each of its BatchNorm modes as documented."""

import copy

import pytest
import torch
from torch import nn

from hvp_ray.selection import Candidates, CandidateScores, score_views


def _network() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    network.train()
    for _ in range(3):
        network(torch.randn(8, 3, 5, 5) + 1)
    return network


def _score(network: nn.Module, views: torch.Tensor, mode: str) -> torch.Tensor:
    def score(views_VB: torch.Tensor, candidates: Candidates) -> CandidateScores:
        out = network(views_VB.flatten(0, 1)).reshape(2, 6, -1)
        return CandidateScores(pairs_BP=(out[0] * out[1]).sum(dim=-1, keepdim=True))

    return score_views(score, views, Candidates(num_views=2), module=network, batch_norm=mode).pairs_BP


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_scoring_leaves_no_trace(mode: str) -> None:
    network = _network()
    before = copy.deepcopy(network.state_dict())
    scores = _score(network, torch.randn(2, 6, 3, 5, 5), mode)
    assert not scores.requires_grad
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in network.modules())
    assert network[1].track_running_stats


def test_faithful_scoring_moves_running_statistics_once() -> None:
    network = _network()
    count = int(network[1].num_batches_tracked)
    mean = network[1].running_mean.clone()
    _score(network, torch.randn(2, 6, 3, 5, 5), "faithful")
    assert int(network[1].num_batches_tracked) == count + 1
    assert not torch.equal(network[1].running_mean, mean)


def test_batch_and_faithful_use_the_batch_and_running_uses_the_running_statistics() -> None:
    network, views = _network(), torch.randn(2, 6, 3, 5, 5) * 3
    reference = copy.deepcopy(network)
    by_batch = _score(network, views, "batch")
    by_running = _score(network, views, "running")
    assert torch.equal(by_batch, _score(copy.deepcopy(reference), views, "faithful"))
    reference.eval()
    with torch.no_grad():
        out = reference(views.flatten(0, 1)).reshape(2, 6, -1)
    assert torch.equal(by_running, (out[0] * out[1]).sum(dim=-1, keepdim=True))
    assert not torch.allclose(by_batch, by_running)
