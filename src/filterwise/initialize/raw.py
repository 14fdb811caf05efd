"""Schemes for raw weights: Kaiming by the filter's own fan-in, and filters of both signs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.initialize.start import Layer, Start

__all__ = ["balanced", "kaiming"]


def kaiming(start: Start, given: Any) -> None:
    """Draw raw weights with He's standard deviation, and put the rest at its start."""
    del given
    drawn: dict[int, Layer] = {}
    for layer in start.layers:
        first = drawn.setdefault(id(layer.weight), layer)
        if not layer.weight.requires_grad:
            start.kept[layer] = "frozen"
        elif first is not layer:
            start.kept[layer] = f"shares its raw weight with {first.name}"
        else:
            _draw(start, layer)


def _draw(start: Start, layer: Layer) -> None:
    raw = layer.weight.detach()
    wide = torch.promote_types(raw.dtype, torch.float32)
    new = torch.empty_like(raw, dtype=wide).normal_(0.0, math.sqrt(2.0 / layer.fan_in))
    new = new.to(raw.dtype)
    words = [f"raw weight normal with standard deviation sqrt(2/{layer.fan_in})"]
    start.set(layer.weight, new)
    if layer.gain is not None:
        start.set(layer.gain, layer.first_gain(new))
        words.append("gain at its start")
    start.set(layer.offset, 0.0)
    if layer.bias is not None:
        start.set(layer.bias, 0.0)
        words.append("bias 0")
    start.reasons[layer] = ", ".join(words)


def balanced(start: Start, given: Any) -> None:
    """Give filters of one sign random signs until both occur; magnitudes are kept."""
    del given
    start.otherwise = "every filter has both signs"
    for layer in start.layers:
        if not layer.weight.requires_grad:
            start.kept[layer] = "frozen"
            continue
        matrix = layer.layout.matrix(layer.weight.detach()).clone()
        # Two weights that are not 0 are needed for two signs.
        waiting = _has_one_sign(matrix) & ((matrix != 0).sum(1) >= 2)
        number = int(waiting.sum())
        while waiting.any():
            rows = matrix[waiting].abs()
            signs = torch.randint(0, 2, rows.shape, device=rows.device) * 2 - 1
            matrix[waiting] = rows * signs.to(rows.dtype)
            waiting &= _has_one_sign(matrix)
        if number:
            start.set(layer.weight, layer.layout.fill(matrix, layer.weight))
            plural = "filter of one sign has" if number == 1 else "filters of one sign have"
            start.reasons[layer] = f"{number} {plural} new signs"


def _has_one_sign(matrix: Tensor) -> Tensor:
    return ~((matrix > 0).any(1) & (matrix < 0).any(1))
