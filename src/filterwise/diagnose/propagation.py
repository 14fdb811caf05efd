"""How a signal goes through a network: predicted and measured variance, parts by sign.

Both functions run a copy of the model once, in the model's own mode.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from filterwise.balance import batched
from filterwise.diagnose.activation_signals import SIGNALS, Activations
from filterwise.diagnose.layers import chosen_layers, inner, refuse
from filterwise.diagnose.trace import as_records
from filterwise.diagnose.weight_signals import Filters
from filterwise.filters import CONVOLUTIONS
from filterwise.host import base_class, effective_weight
from filterwise.verify import random_states

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from filterwise.diagnose.layers import Layer, Layers
    from filterwise.diagnose.trace import Found

__all__ = ["contributions", "propagation"]


def propagation(
    model: nn.Module, input: Any, *, layers: Layers | None = None, histograms: bool = True
) -> list[dict[str, Any]]:
    """Run a batch, of noise say, and return predicted and measured variance layer by layer.

    With ``V_o``, ``mu_o`` and ``b_o`` variance, mean and bias of effective filter o of length n,
    ``Var[Y]`` over samples, positions and channels, and no assumption but that the entries of a
    filter come in any order:

    - ``variance_predicted``: from the patches p that the filters meet, with their means ``m_p`` and
      unbiased variances ``s_p^2``: ``E[Y_o^2] = n V_o E[s_p^2] + E[(n mu_o m_p + b_o)^2]``, less
      the square of the overall mean. Correlation between inputs, unequal channel means and padding
      are in it. Absent for transposed convolutions and for layers with a forward of their own.
    - ``variance_predicted_channels``: from the input's channels alone, as if they were
      uncorrelated: ``mean_o[n (V_o + mu_o^2)] Var[X] + mean_o[n V_o] sum_j (m_j - m)^2/(n-1) +
      Var_o[n mu_o E[X] + b_o]``.
    - ``variance_printed``: ``mean_o[n (V_o + mu_o^2)] E[X^2]``, as WA Eq. 5 has it.
    - ``variance_measured``.

    Beside them stand the signals of the activations, with `histograms` their histograms too.

    Cost: one forward of a copy, and for each layer about ten passes over its input and output.

    Args:
        model: The model; in training mode its norms take this batch's statistics.
        input: What it is called with; a tuple is taken apart.
        layers: As in `record`.
        histograms: Whether to add ``channel_histogram``.

    Returns:
        Records as of `record`, with step 0.
    """
    found: list[Found] = []

    def see(layer: Layer, x: Tensor, y: Tensor) -> None:
        seen = Activations(layer, histograms=histograms)
        seen.add(x, y)
        filters = Filters(layer.matrix(_weight_of(layer, x)))
        values = _predicted(layer, filters, seen, x)
        values["variance_measured"] = seen.outputs.total_variance
        found.extend((layer.name, name, value) for name, value in values.items())
        for one in SIGNALS:
            value = one.compute(seen)
            if value is not None:
                found.append((layer.name, one.info.name, value))

    _run(model, input, layers, see)
    return as_records(found)


def contributions(
    model: nn.Module, input: Any, *, layers: Layers | None = None
) -> list[dict[str, Any]]:
    """Return what positive and negative weights contribute to each output channel of each layer.

    ``positive_contribution`` is the mean over samples and positions of the layer's output with the
    negative entries of its effective weight at zero and without bias; ``negative_contribution`` the
    other part; both add to the mean output less the bias. Under EquiNorm they are +1 and -1 times
    the gain where its geometry is exact: cyclic padding, stride 1, two passes (its Fig. 1 draws the
    sums over the output's elements).

    Cost: one forward of a copy, and two more of each layer that is looked at.

    Args:
        model: The model; in training mode EquiNorm takes this batch's means.
        input: What it is called with; a tuple is taken apart.
        layers: As in `record`.

    Returns:
        Records as of `record`, with step 0, one value a filter.
    """
    found: list[Found] = []

    def see(layer: Layer, x: Tensor, y: Tensor) -> None:
        del y
        weight = _weight_of(layer, x)
        for sign, part in (("positive", weight.clamp_min(0)), ("negative", weight.clamp_max(0))):
            output = _output(layer, x, part)
            axis = -1 if isinstance(layer.module, nn.Linear) else 1
            rows = output.movedim(axis, 0).flatten(1)
            found.append((layer.name, f"{sign}_contribution", rows.mean(1)))

    _run(model, input, layers, see)
    return as_records(found)


def _run(
    model: nn.Module,
    input: Any,
    layers: Layers | None,
    see: Callable[[Layer, Tensor, Tensor], None],
) -> None:
    """Run a copy, and show each layer, its input and output in the order of the forward."""
    root, _ = inner(model)
    refuse(root)
    with torch.inference_mode(False):
        ran = copy.deepcopy(root)
    for layer in chosen_layers(ran, layers):
        if layer.inputs is not None:
            layer.module.register_forward_hook(_shown(layer, see))
    with torch.inference_mode(False), torch.no_grad(), random_states(root):
        ran(*(input if isinstance(input, tuple) else (input,)))


def _shown(layer: Layer, see: Callable[[Layer, Tensor, Tensor], None]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, y = args[0], output
        if not isinstance(module, nn.Linear):
            x, y = batched(module, x), batched(module, y)
        see(layer, x, y)

    return hook


def _weight_of(layer: Layer, x: Tensor) -> Tensor:
    """Return the effective weight of this very forward, outside any graph and what is kept."""
    if not layer.is_converted:
        return layer.weight.detach()
    return effective_weight(layer.module, x, shown=False).detach().clone()


def _output(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Return what the layer computes of x with another weight and no bias."""
    base: Any = base_class(layer.module)
    module: Any = layer.module
    if base in CONVOLUTIONS:
        return module._conv_forward(x, weight, None)
    if base is nn.Linear:
        return functional.linear(x, weight)
    # A forward of the layer's own, on a plain layer with this weight.
    plain = copy.deepcopy(module)
    plain.__class__ = base
    plain._forward_hooks.clear()
    values = {layer.parameter: weight}
    if getattr(plain, "bias", None) is not None:
        values["bias"] = torch.zeros_like(plain.bias)
    return torch.func.functional_call(plain, values, (x,))


def _predicted(layer: Layer, filters: Filters, seen: Activations, x: Tensor) -> dict[str, Tensor]:
    n = filters.length
    groups = getattr(layer.module, "groups", 1)
    bias: Any = getattr(layer.module, "bias", None)
    shift = torch.zeros_like(filters.mean) if bias is None else bias.detach().double()
    scale, mean = n * filters.variance, n * filters.mean
    means, variances = (
        part.view(groups, -1).double() for part in (seen.inputs.mean, seen.inputs.variance)
    )
    places = n // means.shape[1]
    centre = means.mean(1)
    spread = (means - centre[:, None]).square().sum(1) * places / max(n - 1, 1)
    each = len(mean) // groups
    centre, spread, own = (
        one.repeat_interleave(each) for one in (centre, spread, variances.mean(1))
    )
    expected = mean * centre + shift
    square = (scale + mean.square() / n) * own + scale * spread + expected.square()
    whole = scale + mean.square() / n
    found = {
        "variance_predicted_channels": square.mean() - expected.mean().square(),
        "variance_printed": whole.mean() * seen.inputs.square_mean,
    }
    patches = _patches(layer, x)
    if patches is not None and n > 1:
        average = patches[0] / n
        inside = (patches[1] - n * average.square()) / (n - 1)
        first, second, within = (
            one.transpose(0, 1).flatten(1).mean(1).repeat_interleave(each)
            for one in (average, average.square(), inside)
        )
        square = scale * within + mean.square() * second + 2 * mean * shift * first
        expected = mean * first + shift
        total = (square + shift.square()).mean() - expected.mean().square()
        found = {"variance_predicted": total, **found}
    return found


def _patches(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return sum and sum of squares of each patch, ``(samples, groups, positions...)``."""
    module: Any = layer.module
    base = base_class(module)
    x = x.double()
    if base is nn.Linear:
        rows = x.reshape(-1, 1, x.shape[-1])
        return rows.sum(2), rows.square().sum(2)
    if base not in CONVOLUTIONS:
        return None
    if module.padding_mode == "zeros":
        padding = module.padding
    else:
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    samples, spatial = len(x), x.shape[2:]
    x = x.view(samples * module.groups, -1, *spatial)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(spatial) - 1]
    ones = x.new_ones(1, 1, *module.kernel_size)
    done = []
    for part in (x.sum(1, keepdim=True), x.square().sum(1, keepdim=True)):
        sums = convolve(part, ones, None, module.stride, padding, module.dilation)
        done.append(sums.view(samples, module.groups, *sums.shape[2:]))
    return done[0], done[1]
