"""A small network in every recipe, moved off its start, for the tests of running and shipping."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import filterwise as fw

RECIPES = ("gn+ws", "bn+wa", "pws", "sws", "equinorm", "keep+wn")
CLASSES = 5


def network(recipe: str | None, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return two converted convolutions, with norms by the recipe, and a classifier."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    if recipe is not None:
        with warnings.catch_warnings(action="ignore"):
            fw.convert_(model, recipe)
    return model.to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(8, 3, 9, 9, generator=generator)
    return x.to(dtype), torch.randint(CLASSES, (8,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(fw.param_groups(model, 1e-4), lr=0.05, momentum=0.9)


def train(model: nn.Module, steps: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Train a few steps, so that gains, norms and statistics are where training leaves them."""
    optimizer = optimizer_of(model)
    for step in range(steps):
        x, target = batch(step, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model


def moved(model: nn.Module, start: nn.Module) -> torch.Tensor:
    """Return how far the raw weight of the second convolution has come."""
    return (model[3].weight.detach().float() - start[3].weight.detach().float()).flatten()
