"""Kept weights: effective weights that are computed once and serve while nothing changes.

A kept weight serves only while everything that it was computed from is what it was: identity,
version, address and strides of each tensor. The storages are held, so that no address can come back
with other numbers. A write through ``.data``, numpy or DLPack moves none of these; so kept weights
live briefly: between two forwards in evaluation, and in a window of `defer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from filterwise import kernel as kernels
from filterwise.kernel import Layer
from filterwise.kernel.function import is_watched
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.method import WeightMethod

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.kernel import Gradients, Kernel
    from filterwise.methods.method import Method

__all__ = [
    "Computation",
    "KeptWeight",
    "can_keep",
    "changed",
    "compute",
    "differentiate",
    "fill",
    "pull_back",
]


class Computation(NamedTuple):
    """How a layer's effective weight is computed."""

    method: Method
    """The method with its options."""
    layout: FilterLayout
    """Where the filters lie."""
    kernel: Kernel
    """Which implementation computes it."""


def compute(how: Computation, tensors: Sequence[Tensor]) -> Tensor:
    """Compute an effective weight the ordinary way, as part of the graph.

    Args:
        how: The method, the filters' layout and the kernel.
        tensors: Raw weight; gain and offset where there are any; then EquiNorm's statistics.
    """
    method = how.method
    if isinstance(method, EquilibriumNormalization):
        weight, *rest = tensors
        gain = rest.pop(0) if method.has_gain else None
        factor = rest[2] if len(rest) > 2 else 1.0
        return method.effective(weight, rest[0], gain, geometry_factor=factor)
    assert isinstance(method, WeightMethod)
    weight, gain, offset = _roles(method, tensors)
    return method.effective(weight, how.layout, gain, offset, how.kernel)


def _roles(
    method: Method, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rest = list(tensors[1:])
    gain = rest.pop(0) if method.has_gain else None
    return tensors[0], gain, rest.pop(0) if method.has_offset else None


def _layer(how: Computation, tensors: Sequence[Tensor]) -> Layer | None:
    """Return the kernel's view of a layer; None for a method outside the family."""
    method, layout = how.method, how.layout
    if not isinstance(method, WeightMethod) or method.cells:
        return None
    weight, gain, offset = _roles(method, tensors)
    return Layer(weight, method.family(layout.fan_in(weight.shape)), layout, gain, offset)


def can_keep(tensors: Iterable[Tensor]) -> bool:
    """Tell whether an effective weight of these tensors may be kept.

    Not where one is no parameter or buffer of its own (pruned, passed in by `functional_call`, a
    shard or a replica), where its version cannot be read, or while somebody follows operations.
    """
    if is_watched():
        return False
    weight, *rest = tensors
    if type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
        return False
    return all(
        type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.is_leaf
        and not tensor.is_inference()
        for tensor in rest
    )


class KeptWeight:
    """An effective weight, and all that it was computed from.

    Attributes:
        how: The method, the filters' layout and the kernel.
        tensors: What it was computed from, the raw weight first.
        values: The effective weight, outside any graph.
        statistics: What the kernel's forward keeps for its backward; None outside the family.
    """

    def __init__(self, how: Computation, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Make room for the effective weight, in the weight's strides; `fill` computes it."""
        self.how = how
        self.tensors = tuple(tensors)
        # An inference tensor could never be trained with, and has no version.
        with torch.inference_mode(False), torch.no_grad():
            self.values = torch.empty_like(tensors[0], dtype=dtype, requires_grad=False)
        self.statistics: Any = None
        self.spoiled = True
        self.marks: tuple[tuple[Tensor, int, int, tuple[int, ...]], ...] = ()
        self._storages: tuple[Any, ...] = ()
        self._written = 0

    def seal(self) -> None:
        """Note the state of everything it was computed from, and of itself."""
        self.marks = tuple((t, t._version, t.data_ptr(), t.stride()) for t in self.tensors)
        self._storages = tuple(tensor.untyped_storage() for tensor in self.tensors)
        self._written = self.values._version
        self.spoiled = False

    def serves(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether it is what these tensors give."""
        for own, tensor in zip(self.tensors, tensors, strict=True):
            if own is not tensor:
                return False
        return self.is_unchanged()

    def is_unchanged(self) -> bool:
        """Tell whether nothing has written into it, or into what it was computed from."""
        if self.spoiled or self.values._version != self._written:
            return False
        return changed(self.marks) is None


def changed(marks: Iterable[tuple[Tensor, int, int, tuple[int, ...]]]) -> int | None:
    """Return the place of the first tensor that is not what it was; None if all are."""
    for place, (tensor, version, address, strides) in enumerate(marks):
        if tensor._version != version or tensor.data_ptr() != address or tensor.stride() != strides:
            return place
    return None


def fill(many: Iterable[KeptWeight]) -> None:
    """Compute kept weights: one kernel call for all layers of a device and kernel."""
    calls: dict[tuple[Kernel, torch.device], list[tuple[KeptWeight, Layer]]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for kept in many:
            layer = _layer(kept.how, kept.tensors)
            if layer is None:
                kept.values.copy_(compute(kept.how, kept.tensors))
                kept.seal()
            else:
                key = (kept.how.kernel, kept.values.device)
                calls.setdefault(key, []).append((kept, layer))
        for (kernel, _), group in calls.items():
            layers, outs = [layer for _, layer in group], [kept.values for kept, _ in group]
            saved = kernels.forward(layers, outs, kernel)
            for (kept, _), statistics in zip(group, saved, strict=True):
                kept.statistics = statistics
                kept.seal()


def pull_back(
    work: Sequence[tuple[Computation, Sequence[Tensor], Any, Tensor]], *, in_place: bool
) -> list[tuple[Tensor | None, ...]]:
    """Take gradients of effective weights to what they were computed from, outside any graph.

    Args:
        work: For each layer how it is computed, from what, the statistics of its forward, and the
            gradient of its effective weight.
        in_place: Write into the gradients that came in; they are the caller's to give away.

    Returns:
        For each layer a gradient per tensor, or None for one that has no part or is frozen.
    """
    found: list[tuple[Tensor | None, ...]] = [()] * len(work)
    calls: dict[tuple[Kernel, torch.device], list[tuple[int, Layer]]] = {}
    for place, (how, tensors, statistics, gradient) in enumerate(work):
        layer = _layer(how, tensors)
        if layer is None or statistics is None:
            found[place] = differentiate(how, tensors, gradient)
        else:
            calls.setdefault((how.kernel, gradient.device), []).append((place, layer))
    for (kernel, _), group in calls.items():
        gradients: list[Gradients] = kernels.backward(
            [layer for _, layer in group],
            [work[place][2] for place, _ in group],
            [work[place][3] for place, _ in group],
            kernel,
            in_place=in_place,
        )
        for (place, _), of_layer in zip(group, gradients, strict=True):
            found[place] = tuple(one for one in of_layer if one is not None)
    return found


def differentiate(
    how: Computation, tensors: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Go back the ordinary way: for a second derivative, and for methods outside the family.

    Args:
        how: How the effective weight is computed.
        tensors: From what.
        gradient: Gradient of the effective weight.

    Returns:
        A gradient per tensor, None for one that does not require any; part of the graph where
        autograd is recording.
    """
    second = torch.is_grad_enabled()
    own = tensors if second else [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [tensor for tensor in own if tensor.requires_grad]
    with torch.enable_grad():
        weight = compute(how, own)
        found = torch.autograd.grad(
            weight, wanted, gradient.to(weight.dtype), create_graph=second, allow_unused=True
        )
    by_identity = dict(zip(map(id, wanted), found, strict=True))
    return tuple(by_identity.get(id(tensor)) for tensor in own)
