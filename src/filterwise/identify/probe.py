"""Running a copy of a layer on chosen weights, and reading what its convolution computes with."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from filterwise.graph.untouched import untouched
from filterwise.identify.subject import tensor_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.identify.subject import Subject

__all__ = ["Bench", "Probe", "normal", "per_channel_difference", "quiet"]

SEED = 20190325
SHIFT = 0.3  # mean of a probing filter in units of its deviation, so that centring shows
TURNS = 8
CONVOLVE = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    functional.linear,
}


def normal(shape: tuple[int, ...] | torch.Size, seed: int = SEED) -> Tensor:
    """Return normal numbers in float64, the same at every call, without the global generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


class _Watch(TorchFunctionMode):
    """Notes the weight of every convolution and linear map that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func in CONVOLVE:
            self.weights.append(kwargs["weight"] if "weight" in kwargs else args[1])
        return func(*args, **kwargs)


class Probe:
    """A copy of one layer on the CPU, in evaluation, without bias; made and used in `quiet`."""

    def __init__(self, module: nn.Module, subject: Subject, dtype: torch.dtype) -> None:
        """Copy the layer."""
        self.subject = subject
        self.dtype = dtype
        self.copy = _copied(module).to(dtype).eval()
        bias = self.copy._parameters.get("bias")
        if bias is not None:
            bias.zero_()

    def set(self, raw: Tensor, gain: Tensor | None, offset: Tensor | None) -> None:
        """Give the copy these values, one per filter for gain and offset."""
        given = {self.subject.raw: raw, self.subject.gain: gain, self.subject.offset: offset}
        for name, values in given.items():
            if name is not None and values is not None:
                tensor = tensor_at(self.copy, name)
                tensor.copy_(values.reshape(tensor.shape))

    def input(self, extra: int = 0) -> Tensor:
        """Return a small input that the layer accepts, `extra` larger along each spatial axis."""
        module: Any = self.copy
        weight = self.subject.raw_weight(module)
        if weight.dim() == 2:
            return normal((2, weight.shape[1]), SEED + 1).to(self.dtype)
        spatial = weight.dim() - 2
        channels = getattr(module, "in_channels", weight.shape[1] * getattr(module, "groups", 1))
        sizes = []
        for axis in range(spatial):
            dilation = _of_axis(getattr(module, "dilation", 1), axis)
            padding = _of_axis(getattr(module, "padding", 0), axis)
            reach = dilation * (weight.shape[2 + axis] - 1) + 1
            # Reflected padding must be smaller than the input; transposed layers cut their output.
            stride = _of_axis(getattr(module, "stride", 1), axis)
            sizes.append(max(reach, 2 * padding + 1) + stride + extra)
        return normal((2, channels, *sizes), SEED + 1 + extra).to(self.dtype)

    def output(self, x: Tensor) -> Tensor:
        """Run the layer's own forward."""
        if self.subject.hook is not None:
            self.subject.hook(self.copy, (x,))
        return self.copy.forward(x)

    def effective(self) -> Tensor | None:
        """Return the weight that the layer convolves with; None unless it is exactly one."""
        with _Watch() as watch:
            self.output(self.input())
        return watch.weights[0].detach() if len(watch.weights) == 1 else None


class Bench:
    """A probed layer, read as filters of one layout.

    Attributes:
        unit: Filters of deviation 1 or so, in the raw weight's shape.
        gain: Probing gains, one per filter; None for a layer without.
        offset: Probing offsets likewise.
        filters: How many filters there are.
        fan_in: Weights in each.
        fits: Whether there are as many gains and offsets as filters, and more than one weight each.
    """

    def __init__(self, probe: Probe, layout: FilterLayout) -> None:
        """Draw filters, gains and offsets."""
        subject = probe.subject
        self.probe, self.layout = probe, layout
        self.unit = normal(subject.raw_weight(probe.copy).shape) + SHIFT
        self.filters = filters = layout.filters(self.unit.shape)
        self.fan_in = layout.fan_in(self.unit.shape)
        signs = 1 - 2 * (torch.arange(filters) % 2)
        self.gain = (0.5 + normal((filters,), SEED + 2).abs()) * signs if subject.gain else None
        self.offset = normal((filters,), SEED + 3) if subject.offset else None
        names = filter(None, (subject.gain, subject.offset))
        sizes = [tensor_at(probe.copy, name).numel() for name in names]
        self.fits = self.fan_in > 1 and all(size == filters for size in sizes)

    def effective(self, raw: Tensor, offset: Tensor | None) -> Tensor | None:
        """Return what the layer makes of raw weights; None if that cannot be read, or used."""
        self.probe.set(raw, self.gain, self.no_offset if offset is None else offset)
        found = self.probe.effective()
        if found is None or found.shape != raw.shape or not found.isfinite().all():
            return None
        return found

    @property
    def no_offset(self) -> Tensor | None:
        """Offsets of zero, beside which a small filter is seen; None for a layer without."""
        return None if self.offset is None else torch.zeros_like(self.offset)

    def sized(self, turn: int) -> Tensor:
        """Return raw weights whose filters have sizes from 1e-7 to 1e2, in another order each turn.

        So one output tells the formulas apart at every eps.
        """
        sizes = 10.0 ** (
            ((torch.arange(self.filters) + turn) % TURNS).double() * 9 / (TURNS - 1) - 7
        )
        view, _ = self.layout.split(self.unit)
        return self.layout.join(view * self.layout.per_filter(sizes, view))

    @property
    def turns(self) -> int:
        """How many orders show every size to some filter."""
        return -(-TURNS // self.filters)


def _of_axis(value: Any, axis: int) -> int:
    value = value[axis] if isinstance(value, tuple) else value
    return value if isinstance(value, int) else 0


def _copied(module: nn.Module) -> nn.Module:
    # The old weight_norm stores a tensor with a graph, which deepcopy refuses.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for value in module.__dict__.values()
        if isinstance(value, torch.Tensor)
    }
    copied = copy.deepcopy(module, memo)
    tensors = (*copied.parameters(), *copied.buffers())
    if not any(tensor.is_meta for tensor in tensors):
        return copied.cpu()
    copied = copied.to_empty(device="cpu")
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.zero_()
    return copied


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Copy and run a layer without its hooks, gradient, warnings, autocast, or a drawn number."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(untouched(module))
        yield


def per_channel_difference(found: Tensor, expected: Tensor, axis: int) -> float:
    """Return the largest difference of two outputs, each channel relative to its largest entry."""
    if found.shape != expected.shape:
        return math.inf
    a, b = (t.double().movedim(axis, 0).flatten(1) for t in (expected, found))
    scale = a.abs().amax(1)
    gap = (a - b).abs().amax(1)
    if not (scale.isfinite().all() and gap.isfinite().all()):
        return math.inf
    return float(torch.where(gap == 0, 0.0, gap / scale.clamp_min(1e-300)).max())
