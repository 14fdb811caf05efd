"""A form of Weight Standardization that leaves more of float16 and, before a norm, is the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise import norms, verify
from filterwise.errors import ConversionError
from filterwise.filters import check_module
from filterwise.graph import trace
from filterwise.host import base_class, converted, state_of, weight_label
from filterwise.methods.weight_standardization import WeightStandardization
from filterwise.report import Report, Row

if TYPE_CHECKING:
    from filterwise.graph import Flow

__all__ = ["rescale_", "why_not_rescaled"]

EQUAL = 1e-9


def rescale_(model: nn.Module, *, input: Any = None) -> Report:
    r"""Give layers of Weight Standardization the :math:`n^{-1/2}` form, and change nothing else.

    .. math:: \mathrm{norm}_{\epsilon}(\hat W x)
        = \mathrm{norm}_{\epsilon/n}\left(n^{-1/2}\,\hat W x\right)

    This is exact: a norm divides by :math:`\sqrt{v + \epsilon}`, and that root is scaled like its
    input if :math:`\epsilon` is scaled along. So a layer whose output one norm alone takes becomes
    ``ws(scale=fan_in)``, whose filters have norm 1, the norm's eps is divided by the fan-in n, and
    running statistics are scaled. Outputs, the gradients of raw weights and of the norm, and so
    the whole training stay the same up to rounding; between layer and norm float16 has
    :math:`\sqrt n` times the room. Each pair is compared in float64 before it is changed.

    A checkpoint does not hold a norm's eps: convert and rescale a fresh model before loading. One
    of the other form is told by the method's options in its metadata, with a `CheckpointWarning`.

    Args:
        model: A model with converted layers.
        input: A tensor or a tuple of arguments, for a model that cannot be traced without.

    Returns:
        A row ``convert`` for each layer that has the form now, ``keep`` with the reason for others.

    Raises:
        ConversionError: If gradients are gathered in an open window of `defer`.

    Example:
        >>> from filterwise.convert import convert_
        >>> model = nn.Sequential(nn.Conv2d(16, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        ...                       nn.Conv2d(8, 4, 3))
        >>> _ = convert_(model, "bn+ws")
        >>> rescale_(model).converted, round(model[1].eps * 144, 9)
        (['0'], 1e-05)
    """
    check_module(model)
    layers = dict(converted(model))
    for name, module in layers.items():
        keeper = state_of(module).keeper
        if keeper is not None and keeper.gathering is not None and keeper.gathering.is_open:
            raise ConversionError(
                f"{name} ({type(module).__name__}) is in an open window of defer. Rescale between"
                " optimizer steps. The model is unchanged."
            )
    flow = trace(model, input)
    reasons = {name: why_not_rescaled(model, name, flow) for name in layers}
    rows = []
    for name, module in layers.items():
        state, norm, reason = state_of(module), flow.sole_norm(name), reasons[name]
        shape = getattr(module, state.parameter).shape
        fan_in, filters = state.layout.fan_in(shape), state.layout.filters(shape)
        if norm is not None and reason is None:
            _take_form(module, model.get_submodule(norm), fan_in)
            reason = f"its filters have norm 1, and {norm} has eps / {fan_in}"
        action = "keep" if reasons[name] else "convert"
        label, kind = weight_label(name, module), base_class(module).__name__
        rows.append(Row(label, kind, action, str(state.method), reason or "", fan_in, filters))
    notes = [] if layers else ["No layer of this model is converted."]
    if flow.how != "traced":
        notes.append(flow.sentence)
    return Report(rows, notes, verb="rescaled")


def why_not_rescaled(model: nn.Module, name: str, flow: Flow) -> str | None:
    """Return why a converted layer does not get the form, or None."""
    module: Any = model.get_submodule(name)
    state = state_of(module)
    method = state.method
    if not isinstance(method, WeightStandardization) or not method.divide:
        return f"{method.name} does not bring filters to norm sqrt(n)"
    if method.scale == "fan_in":
        return "its filters have norm 1 already"
    if state.gain is not None or state.offset is not None:
        return "its own gains and offsets set its scale"
    if state.origin is not None and state.origin.keys:
        return "it was adopted with checkpoint keys of its own"
    norm_name = flow.sole_norm(name)
    if norm_name is None:
        return "no norm alone takes its output"
    norm: Any = model.get_submodule(norm_name)
    if not isinstance(getattr(norm, "eps", None), float):
        return f"{norm_name} has no eps that can be scaled"
    bias = module._parameters.get("bias")
    if bias is not None and bias.requires_grad and not _is_per_channel(norm, len(bias)):
        return f"its bias, scaled too, would learn at another rate before {norm_name}"
    fan_in = state.layout.fan_in(getattr(module, state.parameter).shape)
    return _difference(module, norm, norm_name, fan_in)


def _is_per_channel(norm: Any, channels: int) -> bool:
    """Tell a norm that takes out whatever is added to a channel, so that a bias has no effect."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups == channels
    frozen = not norm._parameters and norm._buffers
    return isinstance(norm, nn.modules.batchnorm._NormBase) and not frozen


def _difference(module: nn.Module, norm: nn.Module, name: str, fan_in: int) -> str | None:
    """Compare a pair with its other form on float64 copies; say what differs, if it does."""
    if getattr(module, state_of(module).parameter).is_meta:
        return None
    pair = verify.widened(module), verify.widened(norm)
    x = verify.seeded_input(pair[0])
    if x is None:
        return "its input is not known, so that the two forms cannot be compared"
    x = torch.cat([x, x * 0.5, x + 0.25])
    with torch.inference_mode(False), torch.no_grad():
        other = copy.deepcopy(pair)
        _take_form(other[0], other[1], fan_in)
        for training in (False, True):
            outputs = []
            for parts in (pair, other):
                parts[1].train(training)
                value = x
                for part in parts:
                    value = part.forward(value)
                outputs.append(value)
            if verify.relative_difference(*outputs) > EQUAL:
                return f"{name} computes something else with a scaled eps"
    return None


def _take_form(module: Any, norm: Any, fan_in: int) -> None:
    state = state_of(module)
    if state.keeper is not None:
        state.keeper.release()
        state.keeper.forget()
    assert isinstance(state.method, WeightStandardization)
    state.method = replace(state.method, scale="fan_in")
    state.origin = None  # its own class would bring the other form back
    if state.keeper is not None:
        state.keeper.how = state.computation
    norm.eps /= fan_in
    with torch.no_grad():
        if module._parameters.get("bias") is not None:
            module.bias.mul_(fan_in**-0.5)
        for name, scale in zip(norms.STATISTICS, (fan_in**-0.5, 1 / fan_in), strict=True):
            if isinstance(statistic := norm._buffers.get(name), torch.Tensor):
                statistic.mul_(scale)
