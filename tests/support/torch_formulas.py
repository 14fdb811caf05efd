"""Small pieces that the parity tests share: filters, statistics and gradients in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def filters(rows: int = 6, fan_in: int = 576, *, mean: float = 0.02, seed: int = 0) -> Tensor:
    """Return filters of He's scale with a mean, ``(rows, fan_in)`` in float64."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, fan_in, generator=source, dtype=torch.float64)
    return values * (2.0 / fan_in) ** 0.5 + mean


def he_filters(rows: int = 256, fan_in: int = 576, seed: int = 0) -> Tensor:
    """Return normal filters, each rescaled to the variance 2/n exactly; the means stay drawn."""
    weight = filters(rows, fan_in, mean=0.0, seed=seed)
    centred, mean = centre(weight), weight.mean(1, keepdim=True)
    return centred * ((2.0 / fan_in) ** 0.5 / std(centred)) + mean


def centre(weight: Tensor) -> Tensor:
    """Return W - mean(W), filter by filter."""
    return weight - weight.mean(1, keepdim=True)


def std(weight: Tensor) -> Tensor:
    """Return the biased standard deviation of each filter as a column."""
    return centre(weight).square().mean(1, keepdim=True).sqrt()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b> of each filter as a column."""
    return (a * b).sum(1, keepdim=True)


def gradient(function: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> tuple:
    """Return the gradients of <upstream, function(*inputs)> in the inputs."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    return torch.autograd.grad(function(*leaves), leaves, upstream)


def directions(weight: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u, <G, u> and G_perp: what is left of G without u and without ones."""
    u = centre(weight) / centre(weight).norm(dim=1, keepdim=True)
    along = dot(upstream, u)
    return u, along, upstream - along * u - upstream.mean(1, keepdim=True)
