"""How much of float16 each layer leaves: by its filters alone, and on an input."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise import verify
from filterwise.filters import check_module, layout_of, weight_name
from filterwise.findings import Finding, effective_matrix
from filterwise.graph import trace
from filterwise.graph.untouched import random_states
from filterwise.headroom.records import END, HeadRoom, HeadRoomReport
from filterwise.headroom.rescale import why_not_rescaled
from filterwise.host import base_class, is_converted, state_of, weight_label

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from filterwise.graph import Flow

__all__ = ["headroom_findings", "headroom_report"]

LONG = 8.0  # times a He filter's norm, from where on a float16 layer is worth a note
NEAR = 8.0  # times an output may still grow, below which a float16 layer is worth a warning


def headroom_report(model: nn.Module, *, input: Any = None) -> HeadRoomReport:
    r"""Tell how much each layer leaves of float16, before anything overflows.

    For each weight layer the norm of its longest effective filter beside a He filter's (raw Weight
    Standardization: :math:`\sqrt{n/2}`), and with an input how large its output gets beside 65504,
    where float16 ends. The model may be in any dtype and is not changed: a float32 copy is run, in
    the model's own mode, so that what would overflow is seen as a number.

    Args:
        model: Any model, converted or not.
        input: A tensor, or a tuple of arguments, to run the copy on.

    Returns:
        A row for each weight layer, with what `rescale_` can do for it; it prints as a table.

    Raises:
        ValueError: If the model does not run on the input.

    Example:
        >>> from filterwise.convert import convert_
        >>> model = nn.Sequential(nn.Conv2d(512, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        ...                       nn.Conv2d(8, 4, 3))
        >>> _ = convert_(model, "bn+ws")
        >>> round(headroom_report(model)[0].length)  # sqrt(4608 / 2)
        48
    """
    check_module(model)
    flow = trace(model, input)
    arguments = input if isinstance(input, tuple) else (input,)
    largest = {} if input is None else _largest_outputs(model, arguments)
    with torch.no_grad():
        rows = [
            _row(model, name, module, flow, largest.get(name))
            for name, module in model.named_modules()
            if _is_layer(module)
        ]
    return HeadRoomReport(rows, [] if flow.how == "traced" else [flow.sentence])


def headroom_findings(model: nn.Module, arguments: tuple[Any, ...] | None) -> Iterator[Finding]:
    """Find what leaves little of float16, for `check`: by dtype, or under autocast to float16."""
    half = [name for name, one in model.named_modules() if _is_layer(one) and _is_half(one)]
    if not half:
        return
    modules = {name: model.get_submodule(name) for name in half}
    long = {name: _length(_matrix(one)) or 0.0 for name, one in modules.items()}
    long = {name: length for name, length in long.items() if length > LONG}
    largest: dict[str, float] = {}
    if arguments is not None:
        with contextlib.suppress(ValueError):  # check says itself that the model does not run
            largest = _largest_outputs(model, arguments)
    near = {name: top for name, top in largest.items() if name in half and top > END / NEAR}
    if near:
        worst = max(near, key=near.__getitem__)
        yield Finding(
            "error" if near[worst] > END else "warning",
            worst,
            f"float16, and the output reaches {near[worst]:.3g} on the input ({len(near)} such"
            f" layer{'s' if len(near) > 1 else ''})",
            f"float16 ends at {END:g}; beyond are infinities, which the next norm makes NaN",
            _fix(model, near, arguments),
        )
    elif long:
        worst = max(long, key=long.__getitem__)
        yield Finding(
            "note",
            worst,
            f"float16, and the effective filters are {long[worst]:.0f} times as long as a He"
            f" layer's ({len(long)} such layer{'s' if len(long) > 1 else ''})",
            f"before the norm that follows, outputs come that much nearer to float16's end at"
            f" {END:g}",
            _fix(model, long, arguments),
        )


def _fix(model: nn.Module, found: dict[str, float], arguments: tuple[Any, ...] | None) -> str:
    flow = trace(model, arguments)
    can = [
        name
        for name in found
        if is_converted(model.get_submodule(name)) and why_not_rescaled(model, name, flow) is None
    ]
    if not can:
        return "use bfloat16, or a method whose filters have He's scale (gn+wa)"
    return (
        f"rescale_(model) gives {len(can)} of them filters of norm 1, which computes the same;"
        " headroom_report(model, input=...) shows each layer; bfloat16 has room"
    )


def _row(model: nn.Module, name: str, module: Any, flow: Flow, largest: float | None) -> HeadRoom:
    kind, norm = base_class(module).__name__, flow.sole_norm(name)
    if not is_converted(module):
        fan_in = layout_of(module).fan_in(module.weight.shape)
        length = _length(_matrix(module))
        return HeadRoom(name, kind, None, fan_in, length, largest, norm, "plain")
    state = state_of(module)
    fan_in = state.layout.fan_in(getattr(module, state.parameter).shape)
    reason = why_not_rescaled(model, name, flow)
    advice = f"{math.sqrt(fan_in):.3g} times the room" if reason is None else f"no: {reason}"
    return HeadRoom(
        weight_label(name, module),
        kind,
        str(state.method),
        fan_in,
        _length(_matrix(module)),
        largest,
        norm,
        advice,
    )


def _is_layer(module: nn.Module) -> bool:
    return is_converted(module) or weight_name(module) is not None


def _is_half(module: nn.Module) -> bool:
    name = state_of(module).parameter if is_converted(module) else "weight"
    weight = getattr(module, name)
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return weight.dtype == torch.float16


def _matrix(module: Any) -> Tensor | None:
    """Return the effective weight as a filter matrix; None where it is not known."""
    if is_converted(module):
        return effective_matrix(module)
    weight = module.weight.detach()
    if weight.is_meta or not weight.is_floating_point():
        return None
    return layout_of(module).matrix(weight).to(torch.float32)


def _length(matrix: Tensor | None) -> float | None:
    """Return the norm of the longest filter, in units of a He filter's."""
    if matrix is None or not matrix.numel():
        return None
    return float(matrix.norm(dim=1).nan_to_num(0).max()) / math.sqrt(2)


def _largest_outputs(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, float]:
    """Run a copy in float32 or wider, in the model's mode; return each layer's largest output."""
    with torch.inference_mode(False):
        ran = copy.deepcopy(model)
    narrow = (torch.float16, torch.bfloat16)
    tensors = [*ran.parameters(), *ran.buffers()]
    if any(tensor.dtype in narrow for tensor in tensors):
        ran = ran.float()
    wide = tuple(
        value.float() if isinstance(value, torch.Tensor) and value.dtype in narrow else value
        for value in arguments
    )
    largest: dict[str, float] = {}

    def look(name: str, output: Any) -> None:
        for tensor in verify.floating_tensors(output):
            if tensor.numel():
                top = float(tensor.detach().abs().max())
                largest[name] = max(largest.get(name, 0.0), math.inf if math.isnan(top) else top)

    for name, module in ran.named_modules():
        if _is_layer(module):
            module.register_forward_hook(lambda _m, _i, output, name=name: look(name, output))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(random_states(ran))
            for kind in {tensor.device.type for tensor in tensors} - {"meta"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            ran(*wide)
    except Exception as error:
        raise ValueError(
            f"the model does not run on the input: {type(error).__name__}: {error}. Give a tensor,"
            " or a tuple of the arguments that it takes."
        ) from error
    return largest
