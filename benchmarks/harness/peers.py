"""Weight Standardization as other people's code computes it, written from their formulas.

======================== ======================================= ==========================
name                     per filter, c the centred filter        where it is published
======================== ======================================= ==========================
`official`               c / (unbiased std + 1e-5)               the paper's README
`timm`                   c / sqrt(biased variance + 1e-6)        timm's ``StdConv2d``
`composer`               c / sqrt(biased variance + 1e-10)       Composer's parametrization
`layer_norm`             c / sqrt(biased variance + 1e-5)        many private copies
======================== ======================================= ==========================

Each keeps the operations of its source, since they make the cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timm.layers import StdConv2d
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

__all__ = ["FORMS", "composer", "install", "layer_norm", "official", "timm"]


def official(weight: Tensor) -> Tensor:
    """Return ``c / (std + 1e-5)`` with the mean as three nested means and the unbiased std."""
    mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
    weight = weight - mean
    std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return weight / std.expand_as(weight)


def timm(weight: Tensor) -> Tensor:
    """Return ``c / sqrt(variance + 1e-6)`` by `batch_norm` on the weight as one sample."""
    rows = weight.reshape(1, weight.shape[0], -1)
    return functional.batch_norm(
        rows, None, None, training=True, momentum=0.0, eps=1e-6
    ).reshape_as(weight)


def composer(weight: Tensor) -> Tensor:
    """Return ``c / sqrt(variance + 1e-10)`` by `var_mean`."""
    axes = list(range(1, weight.dim()))
    variance, mean = torch.var_mean(weight, dim=axes, keepdim=True, unbiased=False)
    return (weight - mean) / torch.sqrt(variance + 1e-10)


def layer_norm(weight: Tensor) -> Tensor:
    """Return ``c / sqrt(variance + 1e-5)`` by `layer_norm` on the filter matrix."""
    rows = weight.reshape(weight.shape[0], -1)
    return functional.layer_norm(rows, rows.shape[1:], eps=1e-5).reshape_as(weight)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "official": official,
    "timm": timm,
    "composer": composer,
    "layer-norm": layer_norm,
}
"""Each peer's effective weight as a function of the raw one, by the name of its contestant."""


class _OfficialConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, official(self.weight), self.bias)


class _LayerNormConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, layer_norm(self.weight), self.bias)


class _Standardizer(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return composer(weight)


def install(model: nn.Module, peer: str, names: Iterable[str]) -> nn.Module:
    """Give some convolutions of a model a peer's weight, in place, as that peer's users do.

    Args:
        model: A plain model.
        peer: A key of `FORMS`.
        names: Dotted names of plain ``Conv2d`` layers; their raw weights stay.
    """
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(f"{name} is a {type(layer).__name__}, not a Conv2d")
        if peer == "composer":
            parametrize.register_parametrization(layer, "weight", _Standardizer(), unsafe=True)
        elif peer == "timm":
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _std_conv2d(layer))
        else:
            layer.__class__ = _OfficialConv2d if peer == "official" else _LayerNormConv2d
    return model


def _std_conv2d(layer: nn.Conv2d) -> StdConv2d:
    """Return timm's own layer with the parameters of a plain one."""
    theirs = StdConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]  # pairs, as nn.Conv2d stores them
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    theirs.weight, theirs.bias = layer.weight, layer.bias
    return theirs
