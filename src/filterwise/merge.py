r"""What one layer becomes when it is folded: its effective weight, and the BatchNorm behind it.

.. math:: W' = \hat W\,s, \quad b' = \beta + (b - \mu)\,s, \quad s = \gamma / \sqrt{v + \epsilon}

per filter, with the running mean and variance of the norm (specification, 7.4). Everything here
works in place on the copy that `fold` made.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from filterwise import checkpoint, norms
from filterwise.errors import FilterwiseWarning
from filterwise.filters import layout_of
from filterwise.guard import unguard
from filterwise.host import (
    converted,
    effective_weight,
    gain_of,
    offset_of,
    state_of,
    uninstall,
)
from filterwise.methods.method import WeightMethod

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "fold_layer",
    "fold_layers",
    "is_batch_norm",
    "is_frozen",
    "merge",
    "merge_pairs",
    "why_kept",
    "why_not_merged",
]


def fold_layers(model: nn.Module) -> None:
    """Fold every converted layer in place, and take the library's hook and guards off."""
    shared: dict[Any, nn.Parameter] = {}
    for _, module in list(converted(model)):
        fold_layer(module, shared)
    checkpoint.remove_load_hook(model)
    unguard(model)


def fold_layer(module: nn.Module, shared: dict[Any, nn.Parameter] | None = None) -> None:
    """Give a converted layer its plain class, with the effective weight as its weight.

    Args:
        module: A converted layer.
        shared: Folded weights so far, by everything that they were computed from. Two layers on one
            raw weight go on sharing one if they compute the same from it whatever its values; with
            gains or statistics of their own they get a weight each.
    """
    state = state_of(module)
    raw = getattr(module, state.parameter)
    method = state.method
    key = None
    if isinstance(method, WeightMethod):
        given = id(gain_of(module)), id(offset_of(module))
        key = (id(raw), method, state.layout, state.kernel, *given)
    folded = None if shared is None or key is None else shared.get(key)
    if folded is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FilterwiseWarning)
            effective = effective_weight(module)
        folded = nn.Parameter(torch.empty_like(raw).copy_(effective), raw.requires_grad)
        if shared is not None and key is not None:
            shared[key] = folded
    uninstall(module, plain=True)
    setattr(module, state.parameter, folded)


def merge_pairs(model: nn.Module, pairs: Mapping[str, str]) -> None:
    """Merge norms into layers, both by name; what is left of a norm stands under its name."""
    for layer_name, norm_name in pairs.items():
        norm = model.get_submodule(norm_name)
        merge(model.get_submodule(layer_name), norm)
        parent, _, child = norm_name.rpartition(".")
        rest, _ = norms.replacement(norm, "none")
        setattr(model.get_submodule(parent), child, rest)


def merge(layer: Any, norm: Any) -> None:
    """Put a BatchNorm's running statistics and affine into the plain layer before it."""
    weight, layout = layer.weight, layout_of(layer)
    # Wider than the layer where the device can: one rounding in place of four.
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    view, _ = layout.split(weight.to(wide))
    merged = layout.join(view * layout.per_filter(scale, view))
    mean = norm.running_mean.to(wide)
    shift = (-mean if layer.bias is None else layer.bias.to(wide) - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    learns_bias = weight.requires_grad if layer.bias is None else layer.bias.requires_grad
    layer.weight = nn.Parameter(torch.empty_like(weight).copy_(merged), weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(weight.dtype), learns_bias)


def is_frozen(module: nn.Module) -> bool:
    """Tell a BatchNorm whose class always uses its running statistics."""
    return any(cls.__name__.startswith("FrozenBatchNorm") for cls in type(module).__mro__)


def is_batch_norm(module: nn.Module) -> bool:
    """Tell a norm that uses running statistics in evaluation, and no others."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or is_frozen(module)


def why_not_merged(layer: Any, norm: Any, *, asks_for: str | None) -> str | None:
    """Return why a BatchNorm cannot go into the layer that it follows, or None.

    Args:
        layer: A convolution or linear layer.
        norm: The BatchNorm that takes its output.
        asks_for: The argument with which the caller could run the whole model, if it has none.
    """
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return "that layer's weight is computed from other parameters"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if norm.running_mean.numel() != layout_of(layer).filters(layer.weight.shape):
        return "it normalizes another axis than the layer's filters"
    if isinstance(layer, nn.Linear) and asks_for is not None:
        return f"a linear layer's output can have more than two axes; give {asks_for}"
    if layer._forward_hooks or norm._forward_pre_hooks or norm._forward_hooks:
        return "a hook sees what passes between them"
    try:
        norms.replacement(norm, "none")
    except ValueError as error:
        return str(error)
    return None


def why_kept(norm: nn.Module) -> str:
    """Return why a norm stays that nobody asked to merge."""
    if is_batch_norm(norm):
        return "bn=True merges it into the layer before it, where that can be done"
    if isinstance(norm, (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)):
        return "its statistics are each sample's own: no constant weight can stand for them"
    return "not a BatchNorm whose formula is known"
