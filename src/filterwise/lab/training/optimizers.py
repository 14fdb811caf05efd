"""Optimizer and parameter groups of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import filterwise as fw
from filterwise import host

if TYPE_CHECKING:
    from torch import Tensor, nn

    from filterwise.lab.training.settings import Optimization

__all__ = ["make_optimizer"]


def make_optimizer(model: nn.Module, settings: Optimization) -> torch.optim.Optimizer:
    """Return the optimizer of a model's trainable parameters."""
    if settings.decay == "weights":
        groups: list[dict[str, Any]] = fw.param_groups(model, settings.weight_decay)
    else:
        free = _gains(model) if settings.decay == "all-but-gains" else []
        of_gains = {id(gain) for gain in free}
        rest = [each for each in model.parameters() if id(each) not in of_gains]
        groups = [
            {"params": rest, "weight_decay": settings.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
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


def _gains(model: nn.Module) -> list[Tensor]:
    """Return the gains of converted layers, each once."""
    layers = [module for module in model.modules() if host.is_converted(module)]
    gains = [gain for gain in map(host.gain_of, layers) if isinstance(gain, torch.nn.Parameter)]
    return list({id(gain): gain for gain in gains}.values())
