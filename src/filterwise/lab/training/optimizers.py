"""Optimizer and parameter groups of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import filterwise as fw

if TYPE_CHECKING:
    from torch import nn

    from filterwise.lab.training.settings import Optimization

__all__ = ["make_optimizer"]


def make_optimizer(model: nn.Module, settings: Optimization) -> torch.optim.Optimizer:
    """Return the optimizer of a model's trainable parameters."""
    if settings.decay == "weights":
        groups: list[dict[str, Any]] = fw.param_groups(model, settings.weight_decay)
    else:
        groups = [{"params": list(model.parameters()), "weight_decay": settings.weight_decay}]
    for group in groups:
        group["params"] = [each for each in group["params"] if each.requires_grad]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(
        groups,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
    )
