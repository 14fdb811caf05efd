r"""What of a BatchNorm goes into the layer before it when a recipe takes the norm away.

With the norm's evaluation statistics m and v, :math:`s = 1/\sqrt{v + \epsilon}`, and the layer's
bias b (specification, 7.4):

- removed: :math:`\hat W = \gamma s W` and bias :math:`\beta + \gamma s (b - m)`, exactly the norm;
- replaced by a norm of groups: :math:`\hat W = s W` and bias :math:`s (b - m)`. Every channel then
  reaches the new norm with mean 0 and variance 1 over the data, so that a sample's own statistics
  are near those; the new norm has the old one's affine;
- removed behind a layer that gets no method, and so has no gain: bias :math:`b + \beta - m`, which
  leaves the mean right and the scale not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from filterwise import norms
from filterwise.filters import weight_name
from filterwise.host import gain_of, offset_of, state_of
from filterwise.merge import is_batch_norm, why_kept, why_not_merged
from filterwise.methods.preserving import preserving_values, wide_dtype

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor, nn

    from filterwise.graph import Flow
    from filterwise.selection import WeightLayer

__all__ = ["Carry", "Found", "find_carries", "set_bias", "set_factor"]


@dataclass(frozen=True)
class Carry:
    """A BatchNorm, and the layer that takes over what it computes with its running statistics.

    Attributes:
        layer_name: Dotted name of the layer.
        layer: The convolution or linear layer whose output the norm alone takes.
        norm_name: Dotted name of the norm.
        norm: The norm that was there.
        whole: Whether it is removed, its affine with it; otherwise a norm of groups replaces it.
        scales: Whether the layer gets a method, and so a gain.
    """

    layer_name: str
    layer: Any
    norm_name: str
    norm: Any
    whole: bool
    scales: bool

    def factor(self) -> Tensor:
        """Return what each effective filter is multiplied with, ``(filters,)``."""
        wide = wide_dtype(self.norm.running_var.device)
        if not self.scales:
            return torch.ones_like(self.norm.running_var, dtype=wide)
        factor = (self.norm.running_var.to(wide) + self.norm.eps).rsqrt()
        if self.whole and self.norm.weight is not None:
            factor = factor * self.norm.weight.detach().to(wide)
        return factor

    def moved(self, bias: Tensor | None) -> Tensor:
        """Return the bias that stands for the layer's own and the norm's shift."""
        wide = wide_dtype(self.norm.running_mean.device)
        mean = self.norm.running_mean.to(wide)
        own = torch.zeros_like(mean) if bias is None else bias.detach().to(wide)
        moved = (own - mean) * self.factor() if self.scales else own - mean
        if self.whole and self.norm.bias is not None:
            moved = moved + self.norm.bias.detach().to(wide)
        return moved

    def of_output(self, output: Tensor, axis: int = 1) -> Tensor:
        """Return what the layer should hand on, for what it handed to the norm before."""
        if self.whole and self.scales:
            found = norms.normalize(self.norm, output)
            assert found is not None
            return found
        shape = [1] * output.dim()
        shape[axis] = -1
        wide = output.to(wide_dtype(output.device))
        zero = torch.zeros_like(self.norm.running_mean)
        moved = wide * self.factor().view(shape) + self.moved(zero).view(shape)
        return moved.to(output.dtype)


@dataclass(frozen=True)
class Found:
    """What can be carried of the norms that go.

    Attributes:
        carries: By the norm's name.
        reasons: Why nothing of the norm is carried, by its name.
        followed: Names of norms by the layer whose output they alone take.
    """

    carries: dict[str, Carry]
    reasons: dict[str, str]
    followed: dict[str, str]


def find_carries(
    model: nn.Module,
    flow: Flow,
    layers: Sequence[WeightLayer],
    converted: Collection[str],
    going: Sequence[str],
    *,
    whole: bool,
    has_example: bool,
) -> Found:
    """Find what layers can take over from the norms that go.

    Args:
        model: The model before anything is changed.
        flow: What follows what in it.
        layers: Its weight layers.
        converted: Names of the modules that get a method.
        going: Names of the norms that are removed, or replaced by norms of groups.
        whole: Whether they are removed.
        has_example: Whether there is data to see what a linear layer hands on.
    """
    hosts = {
        norm: layer.module_name
        for layer in layers
        if weight_name(layer.module) and (norm := flow.sole_norm(layer.module_name))
    }
    owners: dict[int, int] = {}
    for module in model.modules():
        bias = module._parameters.get("bias")
        owners[id(bias)] = owners.get(id(bias), 0) + 1
    carries, reasons = {}, {}
    for name in going:
        norm, host = model.get_submodule(name), hosts.get(name)
        scales = host in converted
        if not is_batch_norm(norm):
            reasons[name] = why_kept(norm)
        elif host is None:
            reasons[name] = "no single convolution or linear layer hands its output to it"
            if flow.how == "registration order":
                reasons[name] = "what stands before it is a guess"
        elif reason := _why_not(model.get_submodule(host), norm, owners, has_example):
            reasons[name] = f"it follows {host}, but {reason}"
        elif not whole and not scales:
            reasons[name] = f"{host}, before it, gets no gain to take its running statistics"
        else:
            layer = model.get_submodule(host)
            carries[name] = Carry(host, layer, name, norm, whole, scales)
    return Found(carries, reasons, {layer: norm for norm, layer in hosts.items()})


def _why_not(
    layer: nn.Module, norm: nn.Module, owners: dict[int, int], has_example: bool
) -> str | None:
    bias = layer._parameters.get("bias")
    if bias is not None and owners[id(bias)] > 1:
        return "that layer shares its bias with another"
    return why_not_merged(layer, norm, asks_for=None if has_example else "loader")


def set_factor(module: nn.Module, factor: Tensor) -> None:
    """Let a preserved layer's effective weight be its raw weight times a number per filter."""
    state = state_of(module)
    weight = getattr(module, state.parameter)
    mean, phi = module._buffers.get("input_mean"), module._buffers.get("geometry_factor")
    gain, offset = preserving_values(
        state.method, weight, state.layout, mean, 1.0 if phi is None else phi
    )
    with torch.no_grad():
        for target, value in ((gain_of(module), gain), (offset_of(module), offset)):
            if target is not None and value is not None:
                target.copy_((value * factor).reshape(target.shape))


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Write a layer's bias, in place."""
    own = module._parameters["bias"]
    assert own is not None
    with torch.inference_mode(own.is_inference()), torch.no_grad():
        own.copy_(bias)
