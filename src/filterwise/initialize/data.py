"""The start from data: one pass over a batch, in which each layer sets its gain when reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from filterwise.filters import weight_name
from filterwise.graph.untouched import untouched
from filterwise.initialize.start import refused, restored

if TYPE_CHECKING:
    from collections.abc import Callable

    from filterwise.initialize.start import Layer, Start

__all__ = ["from_data"]

METHODS = ("pws", "wn", "cwn")


class _Found(NamedTuple):
    gain: Tensor
    bias: Tensor
    words: str


def from_data(start: Start, given: Any) -> None:
    """Set gains and biases from the outputs on a batch (specification, 3.1 and 5.1)."""
    start.otherwise = "not converted"
    if given is None:
        raise refused("'data' needs a batch; pass input=")
    if not start.converted:
        raise refused("no layer is converted, so there is no gain for 'data'; convert_ first")
    for layer in start.converted:
        if (
            layer.method is None
            or layer.method.name not in METHODS
            or not weight_name(layer.module)
        ):
            raise refused(
                f"{layer.where} has no start from data; there is one for convolutions and linear"
                f" layers under {', '.join(METHODS)}"
            )
    targets = {layer: (layer.gain, layer.bias) for layer in start.converted}
    written = [tensor for pair in targets.values() for tensor in pair if tensor is not None]
    with restored(written):
        found = _pass(start.model, start.converted, given)
    for layer, (gain, bias) in targets.items():
        if layer in found:
            start.set(gain, found[layer].gain)
            start.set(bias, found[layer].bias)
            start.reasons[layer] = found[layer].words
        else:
            start.kept[layer] = "not used with this input"


def _method(layer: Layer) -> str:
    return layer.method.name if layer.method else ""


def _pass(model: nn.Module, layers: list[Layer], given: Any) -> dict[Layer, _Found]:
    """Run the model once; a layer that is reached goes on with the gain it has found."""
    found: dict[Layer, _Found] = {}

    def reaching(layer: Layer, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def reached(*args: Any, **kwargs: Any) -> Tensor:
            if layer not in found:
                _fill(layer, 1.0, 0.0)
                output = forward(*args, **kwargs)
                found[layer] = _from_output(layer, (*args, *kwargs.values())[0], output)
                _fill(layer, found[layer].gain, found[layer].bias)
            return forward(*args, **kwargs)

        return reached

    with untouched(model):
        for layer in layers:
            layer.module.__dict__["forward"] = reaching(layer, layer.module.forward)
        if isinstance(given, tuple):
            model(*given)
        elif isinstance(given, Mapping):
            model(**given)
        else:
            model(given)
    return found


def _fill(layer: Layer, gain: Tensor | float, bias: Tensor | float) -> None:
    for target, value in ((layer.gain, gain), (layer.bias, bias)):
        if target is not None:
            values = torch.as_tensor(value, device=target.device)
            target.copy_(values.reshape(target.shape) if values.dim() else values)


def _from_output(layer: Layer, x: Tensor, output: Tensor) -> _Found:
    """Return what makes a good start of the output on `x` at gain 1 and bias 0."""
    wide = output.detach().to(torch.promote_types(output.dtype, torch.float32))
    if isinstance(layer.module, nn.Linear):
        channels = wide.movedim(-1, 0).flatten(1)
    else:  # a convolution's input may come without a batch axis
        channels = wide.movedim(1 if output.dim() == layer.weight.dim() else 0, 0).flatten(1)
    whole = _method(layer) == "pws"
    if whole:
        channels = channels.reshape(1, -1)
    mean, variance = channels.mean(1), channels.var(1, correction=0)
    alive = variance > _of_rounding(layer, x, output, mean)
    if not alive.any() or not channels.isfinite().all():
        raise refused(f"the output of {layer.where} is constant, or not finite, on this input")
    first = layer.first_gain()
    if whole:
        alpha = float((2.0 / variance).sqrt())
        words = f"gain {alpha:.4g}, with which the output's variance is 2"
        return _Found(torch.full_like(first, alpha), torch.zeros_like(first), words)
    scale = torch.where(alive, variance, 1.0).rsqrt()
    words = "gain, with which each channel has standard deviation 1; no bias for its mean"
    if layer.bias is not None:
        words = "gain and bias, with which each channel has mean 0 and standard deviation 1"
    if dead := int((~alive).sum()):
        words += f"; {dead} constant channels stay"
    bias = torch.where(alive, -mean * scale, 0.0)
    return _Found(torch.where(alive, scale, first.to(scale)), bias, words)


def _of_rounding(layer: Layer, x: Tensor, output: Tensor, mean: Tensor) -> Tensor:
    """Return the variance that a constant output has, too, by rounding its sums and itself.

    At gain 1 a filter's norm is sqrt(2) at most, so a sum of n products is off by about
    sqrt(2 n) rms(x) eps; four times that is allowed for.
    """
    wide = x.detach().to(mean.dtype)
    sums = 32 * torch.finfo(mean.dtype).eps ** 2 * layer.fan_in * wide.square().mean()
    return sums + (4 * torch.finfo(output.dtype).eps * mean).square()
