"""Nets for the tests of conversions that keep the function."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Convolutions with norms of every fate, one without a norm, a residual sum, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.plain = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 16, 3, padding=1, groups=2)
        self.up_norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 8, 3, padding=1)
        self.last_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.plain(x))
        x = torch.relu(self.up_norm(self.up(x)))
        x = torch.relu(self.last_norm(self.last(x)))
        return self.head(x.mean((2, 3)))


def perturbed(net: nn.Module) -> nn.Module:
    """Give weights a mean, and norms statistics and affine values of their own."""
    source = torch.Generator().manual_seed(5)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=source, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                module.weight.copy_(0.1 * normal(module.weight) + 0.02)
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
                module.weight.copy_(1 + 0.3 * normal(module.weight))
                module.weight[0] = -0.7  # a channel that the norm turns round
                module.bias.copy_(0.2 * normal(module.bias))
                module.running_mean.copy_(0.3 * normal(module.running_mean))
                module.running_var.copy_(normal(module.running_var).exp())
    return net


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a perturbed small net, always the same, in training mode as a checkpoint leaves it."""
    torch.manual_seed(0)
    return perturbed(Small()).to(dtype)


def pictures(dtype: torch.dtype = torch.float64, count: int = 6, seed: int = 0) -> Tensor:
    """Return positive pictures with a mean."""
    source = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=source, dtype=torch.float64).to(dtype)


def settled(net: nn.Module, x: Tensor) -> nn.Module:
    """Give BatchNorms the statistics of their data."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        net(x)
    return net


def answer(net: nn.Module, x: Tensor) -> Tensor:
    """Return what a net says in evaluation mode."""
    was = net.training
    with torch.no_grad():
        found = net.eval()(x)
    net.train(was)
    return found


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())
