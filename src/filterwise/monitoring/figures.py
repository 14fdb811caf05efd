"""What the monitor reads of a layer around one optimizer step: a few numbers, one read-back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from filterwise.diagnose.layers import Layer, chosen_layers
from filterwise.diagnose.weight_signals import Filters, angle
from filterwise.graph import trace
from filterwise.host import state_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch import Tensor

    from filterwise.methods.method import Method

__all__ = ["LEAST_FAN_IN", "Figures", "Watched", "figures_of", "watched_layers"]

LEAST_FAN_IN = 16
"""Filters of fewer weights say little: conversion leaves them alone, too."""


@dataclass(frozen=True)
class Watched(Layer):
    """A layer that the monitor looks at.

    Attributes:
        last: Whether no other weight layer follows.
    """

    last: bool

    @property
    def method(self) -> Method | None:
        """What it was converted to; None for a plain layer."""
        return state_of(self.module).method if self.is_converted else None

    @property
    def fan_in(self) -> int:
        """Weights in a filter."""
        return self.layout.fan_in(self.weight.shape)

    def rows(self) -> Tensor:
        """Return the raw weight as a filter matrix in float32 or wider; it may be a view."""
        return self.matrix(self.weight)


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
    try:
        layers = chosen_layers(model)
    except ValueError:  # no weight layer at all
        return []
    flow = trace(model, arguments)
    found: list[Watched] = []
    for one in layers:
        weight = one.weight
        if not isinstance(weight, nn.Parameter) or weight.is_meta or not weight.requires_grad:
            continue
        if one.is_converted or one.layout.fan_in(weight.shape) >= LEAST_FAN_IN:
            last = flow.is_last(one.name)
            found.append(Watched(one.name, one.path, one.module, one.parameter, one.layout, last))
    return found


def figures_of(layers: Sequence[Watched], before: Sequence[Tensor]) -> list[Figures]:
    """Return the figures of layers.

    About thirty passes over the weights and one read from each device; nothing is written.

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
    now = Filters(layer.rows())
    old = Filters(before.to(now.matrix.device, now.matrix.dtype))
    shift = now.length * (now.mean - old.mean)
    one_signed = (now.matrix.amin(1) > 0) | (now.matrix.amax(1) < 0)
    variance = moment = now.variance
    if layer.is_centred:
        turns = angle(now.centred, old.centred)
    else:
        turns = angle(now.matrix, old.matrix)
        moment = now.norm.square() / now.length
    return torch.stack(
        [
            variance.isfinite().all().double(),
            variance.where(variance > 0, math.inf).amin(),
            moment.median(),
            # A filter of zeros has no direction, and does not turn.
            torch.rad2deg(turns.nan_to_num(0.0)).median(),
            shift.var(correction=0),
            one_signed.sum().double(),
        ]
    )
