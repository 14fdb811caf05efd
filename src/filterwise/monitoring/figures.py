"""What the monitor reads of a layer around one optimizer step: a few numbers, one read-back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from filterwise.filters import layout_of, weight_name
from filterwise.graph import trace
from filterwise.host import is_converted, state_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.methods.method import Method

__all__ = ["LEAST_FAN_IN", "Figures", "Watched", "figures_of", "watched_layers"]

LEAST_FAN_IN = 16
"""Filters of fewer weights say little: conversion leaves them alone, too."""


@dataclass(frozen=True)
class Watched:
    """A layer that the monitor looks at.

    Attributes:
        name: Dotted name.
        module: The layer.
        parameter: Name of its (raw) weight.
        layout: Where its filters lie.
        method: What it was converted to; None for a plain layer.
        last: Whether no other weight layer follows.
    """

    name: str
    module: nn.Module
    parameter: str
    layout: FilterLayout
    method: Method | None
    last: bool

    @property
    def weight(self) -> Tensor:
        """The (raw) weight as it is now."""
        return getattr(self.module, self.parameter)

    @property
    def centred(self) -> bool:
        """Whether the layer computes with filters of mean zero."""
        return self.method is not None and self.method.centred

    def matrix(self) -> Tensor:
        """Return the weight as a filter matrix in float32 or wider; it may be a view."""
        matrix = self.layout.matrix(self.weight.detach())
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


class Figures(NamedTuple):
    """One layer at one look, with V = Var[W] of a filter and d = W after less W before the step.

    Attributes:
        finite: 1 if every weight is finite, else 0.
        least_variance: The smallest V that is not 0 (infinity where all are).
        variance: The median V; the median mean square, where the method does not centre.
        turn: The median over filters of the angle by which the step turned them, in degrees; of
            their deviations from the mean, where the layer centres them.
        shift: The shift of the average gradient, Var over filters of n E[d] (the PWS paper's
            Fig. 1 (b), with the step as it was taken, momentum and decay included, in place of
            rate times gradient).
        one_signed: Filters whose weights all have one sign.
    """

    finite: float
    least_variance: float
    variance: float
    turn: float
    shift: float
    one_signed: float


def watched_layers(model: nn.Module, arguments: tuple[Any, ...] | None = None) -> list[Watched]:
    """Return the layers that the monitor looks at.

    Those are converted layers, and plain convolutions and linear layers of a fan-in of 16 or more,
    with a weight that is trained, whole and on a real device.
    """
    found: list[Watched] = []
    flow = trace(model, arguments)
    for name, module in model.named_modules():
        if is_converted(module):
            state = state_of(module)
            one = (state.parameter, state.layout, state.method)
        elif weight_name(module):
            one = ("weight", layout_of(module), None)
        else:
            continue
        weight = getattr(module, one[0])
        if not isinstance(weight, nn.Parameter) or weight.is_meta or not weight.requires_grad:
            continue
        if is_converted(module) or one[1].fan_in(weight.shape) >= LEAST_FAN_IN:
            found.append(Watched(name, module, *one, last=flow.is_last(name)))
    return found


def figures_of(layers: Sequence[Watched], before: Sequence[Tensor]) -> list[Figures]:
    """Return the figures of layers.

    Four or so passes over the weights and one read from each device; nothing is written.

    Args:
        layers: The layers as they are after a step.
        before: The filter matrix of each as it was before it.
    """
    with torch.no_grad():
        rows = [_figures(one, old) for one, old in zip(layers, before, strict=True)]
    found: list[Figures | None] = [None] * len(rows)
    for device in {row.device for row in rows}:
        places = [i for i, row in enumerate(rows) if row.device == device]
        for i, values in zip(places, torch.stack([rows[i] for i in places]).tolist(), strict=True):
            found[i] = Figures(*values)
    return [one for one in found if one is not None]


def _figures(layer: Watched, before: Tensor) -> Tensor:
    after = layer.matrix()
    before = before.to(after.device, after.dtype)
    fan_in = after.shape[1]
    variance, mean = torch.var_mean(after, 1, correction=0)
    moment, old = after.square().mean(1), before
    shift = fan_in * (mean - before.mean(1))
    one_signed = (after.amin(1) > 0) | (after.amax(1) < 0)
    if layer.centred:
        after = after - mean[:, None]
        old = before - before.mean(1, keepdim=True)
        moment = variance
    turn = _angles(after, old)
    return torch.stack(
        [
            variance.isfinite().all().to(after.dtype),
            variance.where(variance > 0, math.inf).amin(),
            moment.median(),
            turn.median(),
            shift.var(correction=0),
            one_signed.sum().to(after.dtype),
        ]
    ).float()


def _angles(one: Tensor, other: Tensor) -> Tensor:
    """Return the angle between rows in degrees, 0 where a row is 0; exact for small ones, too."""
    tiny = torch.finfo(one.dtype).tiny
    chord = (
        one / one.norm(dim=1, keepdim=True).clamp_min(tiny)
        - other / other.norm(dim=1, keepdim=True).clamp_min(tiny)
    ).norm(dim=1)
    angle = torch.rad2deg(2 * torch.asin((chord / 2).clamp_max(1)))
    return angle.where((one != 0).any(1) & (other != 0).any(1), 0.0)
