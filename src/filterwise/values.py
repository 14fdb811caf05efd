"""The tensors that a method adds to a layer, and their initial values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from filterwise import balance
from filterwise.methods.preserving import preserving_values
from filterwise.state import state_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.state import HostState

__all__ = ["first_values", "own_tensors", "start"]


def own_tensors(module: nn.Module) -> list[str]:
    """Return the names of the method's parameters and buffers in a converted layer."""
    state = state_of(module)
    names = [name for name in (state.gain, state.offset) if name is not None]
    names += [name for name in balance.BUFFERS if name in module._buffers]
    return [*names, "bias"] if state.adds_bias else names


def first_values(
    state: HostState, weight: Tensor, input_mean: Tensor | None, preserve: bool
) -> dict[str, Tensor]:
    """Return new values of a layer's gain and offset, by name where it has them.

    Args:
        state: What the layer knows of its conversion.
        weight: Its raw weight.
        input_mean: EquiNorm's statistics of the input.
        preserve: Whether the effective weight is to be the raw one; else they have no effect, or
            are where the method starts.
    """
    method, layout = state.method, state.layout
    if preserve:
        gain, offset = preserving_values(method, weight, layout, input_mean)
    else:
        gain = method.gain_start(layout.matrix(weight))
        offset = weight.new_zeros(layout.filters(weight.shape))
    return {
        name: value.to(weight.dtype, copy=True)
        for name, value in ((state.gain, gain), (state.offset, offset))
        if name is not None and value is not None
    }


def start(module: nn.Module, names: Sequence[str], preserve: bool) -> None:
    """Set parameters and buffers that a checkpoint does not have to their initial values.

    Args:
        module: A converted layer, whose raw weight is the checkpoint's.
        names: What the checkpoint does not have.
        preserve: Whether the effective weight is to be that raw weight.
    """
    state = state_of(module)
    weight = getattr(module, state.parameter).detach()
    with torch.no_grad():
        mean = module._buffers.get("input_mean")
        if mean is not None and "input_mean" in names:
            mean = torch.ones_like(mean, device=weight.device)
        values = first_values(state, weight, mean, preserve)
        for name in names:
            old = getattr(module, name)
            if name in values:
                first = values[name].reshape(old.shape)
            elif name in ("input_mean", "geometry_factor"):
                first = torch.ones_like(old, device=weight.device)
            else:
                first = torch.zeros_like(old, device=weight.device)
            if old.device == first.device:
                old.copy_(first)
            elif isinstance(old, nn.Parameter):  # a checkpoint assigned into a meta model
                module._parameters[name] = nn.Parameter(first, old.requires_grad)
            else:
                module._buffers[name] = first
