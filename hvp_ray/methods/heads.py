"""Projection and prediction heads."""

from torch import nn


def simsiam_projector(in_dim: int, out_dim: int, num_layers: int) -> nn.Sequential:
    """MLP of `num_layers` layers of width `out_dim`; BatchNorm after each, the last without affine parameters.

    Source: SimSiam, section 2 (baseline settings) and appendix D (two layers for CIFAR).
    """
    layers: list[nn.Module] = []
    width = in_dim
    for _ in range(num_layers - 1):
        layers += [nn.Linear(width, out_dim, bias=False), nn.BatchNorm1d(out_dim), nn.ReLU(inplace=True)]
        width = out_dim
    layers += [nn.Linear(width, out_dim, bias=False), nn.BatchNorm1d(out_dim, affine=False)]
    return nn.Sequential(*layers)


def simsiam_predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """Bottleneck MLP with BatchNorm on the hidden layer only. Source: SimSiam, section 2."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, dim),
    )
