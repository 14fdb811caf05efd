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
    from filterwise.kernel import Kernel
    from filterwise.methods.method import Method

__all__ = [
    "Computation",
    "KeptWeight",
    "Made",
    "are_own",
    "are_shared",
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
    roles: tuple[str, ...] = ()
    """Which of "gain" and "offset" stand behind the raw weight, in this order."""


def compute(how: Computation, tensors: Sequence[Tensor]) -> Tensor:
    """Compute an effective weight the ordinary way, as part of the graph.

    Args:
        how: The method, the filters' layout and the kernel.
        tensors: Raw weight; gain and offset where there are any; then EquiNorm's statistics.
    """
    method = how.method
    if isinstance(method, EquilibriumNormalization):
        weight, *rest = tensors
        gain = rest.pop(0) if "gain" in how.roles else None
        factor = rest[2] if len(rest) > 2 else 1.0
        return method.effective(weight, rest[0], gain, geometry_factor=factor)
    assert isinstance(method, WeightMethod)
    weight, gain, offset = _roles(how, tensors)
    return method.effective(weight, how.layout, gain, offset, how.kernel)


def _roles(
    how: Computation, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    found = dict(zip(how.roles, tensors[1:], strict=False))
    return tensors[0], found.get("gain"), found.get("offset")


def _layer(how: Computation, tensors: Sequence[Tensor]) -> Layer | None:
    """Return the kernel's view of a layer; None for a method outside the family."""
    method, layout = how.method, how.layout
    if not isinstance(method, WeightMethod) or method.cells:
        return None
    weight, gain, offset = _roles(how, tensors)
    return Layer(weight, method.family(layout.fan_in(weight.shape)), layout, gain, offset)


def can_keep(tensors: Sequence[Tensor]) -> bool:
    """Tell whether an effective weight of these tensors may be kept now.

    Not while somebody follows operations: a transform, a compiler, a tracer.
    """
    return not is_watched() and are_own(tensors)


def are_own(tensors: Sequence[Tensor]) -> bool:
    """Tell whether these are a layer's own parameters and buffers, whose versions can be read.

    Not where one was pruned, passed in by `functional_call`, is a shard (which may be flat or
    empty) or a replica, or was made in inference mode.
    """
    weight = tensors[0]
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dim() < 2 or not weight.numel():
        return False
    for tensor in tensors:
        if tensor.is_inference() or not tensor.is_leaf:
            return False
        if type(tensor) is not nn.Parameter and type(tensor) is not torch.Tensor:
            return False
    return True


Mark = tuple["Tensor", int, int, tuple[int, ...]]
"""A tensor, and its version, address and strides when it was read."""


class Made(NamedTuple):
    """One computation of an effective weight, as its backward needs it."""

    how: Computation
    """The method, the filters' layout and the kernel."""
    tensors: tuple[Tensor, ...]
    """What it was computed from, the raw weight first."""
    layer: Layer | None
    """The same as a kernel sees it; None outside the family."""
    statistics: Any
    """What the kernel's forward keeps for its backward."""
    marks: tuple[Mark, ...]
    """By which a change of the tensors is seen."""


def are_shared(tensors: Sequence[Tensor]) -> bool:
    """Tell whether another process may write into one of these: versions are counted in each."""
    return any(t.device.type == "cpu" and t.untyped_storage().is_shared() for t in tensors)


class KeptWeight:
    """An effective weight, and all that it was computed from.

    Attributes:
        how: The method, the filters' layout and the kernel.
        values: The effective weight, outside any graph.
        made: How it was last computed; None before.
        spoiled: Whether something has happened to it that leaves no mark.
    """

    def __init__(self, how: Computation, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Make room for the effective weight, in the weight's strides; `fill` computes it."""
        self.how = how
        self.tensors: tuple[Tensor, ...] = ()
        self.made: Made | None = None
        self.spoiled = True
        self._layer: Layer | None = None
        self._storages: tuple[Any, ...] = ()
        self._written = 0
        self.take_from(tensors)
        # An inference tensor could never be trained with, and has no version.
        with torch.inference_mode(False), torch.no_grad():
            self.values = torch.empty_like(tensors[0], dtype=dtype, requires_grad=False)

    def take_from(self, tensors: Sequence[Tensor]) -> None:
        """Be computed from these tensors from now on."""
        if not self._is_from(tensors):
            self.tensors = tuple(tensors)
            self._layer = _layer(self.how, tensors)

    def _is_from(self, tensors: Sequence[Tensor]) -> bool:
        own = self.tensors
        if len(own) != len(tensors):
            return False
        for one, tensor in zip(own, tensors, strict=True):  # noqa: SIM110 (twice as fast)
            if one is not tensor:
                return False
        return True

    @property
    def layer(self) -> Layer | None:
        """The layer as a kernel sees it; None outside the family."""
        return self._layer

    def seal(self, statistics: Any) -> None:
        """Note the state of everything it was computed from, and of itself."""
        marks = tuple((t, t._version, t.data_ptr(), t.stride()) for t in self.tensors)
        self.made = Made(self.how, self.tensors, self._layer, statistics, marks)
        self._storages = tuple(tensor.untyped_storage() for tensor in self.tensors)
        self._written = self.values._version
        self.spoiled = False

    def serves(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether it is what these tensors give."""
        return self._is_from(tensors) and self.is_unchanged()

    def is_unchanged(self) -> bool:
        """Tell whether nothing has written into it, or into what it was computed from."""
        if self.made is None or self.spoiled or self.values._version != self._written:
            return False
        return changed(self.made.marks) is None


def changed(marks: Iterable[Mark]) -> int | None:
    """Return the place of the first tensor that is not what it was; None if all are."""
    for place, (tensor, version, address, strides) in enumerate(marks):
        if tensor._version != version or tensor.data_ptr() != address or tensor.stride() != strides:
            return place
    return None


def fill(many: Iterable[KeptWeight]) -> None:
    """Compute kept weights: one kernel call for all layers of a device and kernel."""
    calls: dict[tuple[Kernel, torch.device], list[KeptWeight]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for kept in many:
            if kept.layer is None:
                kept.values.copy_(compute(kept.how, kept.tensors))
                kept.seal(None)
            else:
                calls.setdefault((kept.how.kernel, kept.values.device), []).append(kept)
        for (kernel, _), group in calls.items():
            layers = [kept.layer for kept in group if kept.layer is not None]
            saved = kernels.forward(layers, [kept.values for kept in group], kernel)
            for kept, statistics in zip(group, saved, strict=True):
                kept.seal(statistics)


def pull_back(
    work: Sequence[tuple[Made, Tensor]], *, in_place: bool
) -> list[tuple[Tensor | None, ...]]:
    """Take gradients of effective weights to what they were computed from, outside any graph.

    Args:
        work: For each layer how its effective weight was computed, and its gradient.
        in_place: Write into the gradients that came in; they are the caller's to give away.

    Returns:
        For each layer a gradient per tensor, or None for one that has no part.
    """
    found: list[tuple[Tensor | None, ...]] = [()] * len(work)
    calls: dict[tuple[Kernel, torch.device], list[int]] = {}
    for place, (made, gradient) in enumerate(work):
        if made.layer is None:
            found[place] = differentiate(made, gradient)
        else:
            calls.setdefault((made.how.kernel, gradient.device), []).append(place)
    for (kernel, _), places in calls.items():
        gradients = kernels.backward(
            [layer for place in places if (layer := work[place][0].layer) is not None],
            [work[place][0].statistics for place in places],
            [work[place][1] for place in places],
            kernel,
            in_place=in_place,
        )
        for place, of_layer in zip(places, gradients, strict=True):
            found[place] = tuple(one for one in of_layer if one is not None)
    return found


def differentiate(made: Made, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Go back the ordinary way: for a second derivative, and for methods outside the family.

    Args:
        made: How the effective weight was computed.
        gradient: Its gradient.

    Returns:
        A gradient per tensor, None for one that does not require any; part of the graph where
        autograd is recording.
    """
    second, tensors = torch.is_grad_enabled(), made.tensors
    own = tensors if second else [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [tensor for tensor in own if tensor.requires_grad]
    with torch.enable_grad():
        weight = compute(made.how, own)
        found = torch.autograd.grad(
            weight, wanted, gradient.to(weight.dtype), create_graph=second, allow_unused=True
        )
    by_identity = dict(zip(map(id, wanted), found, strict=True))
    return tuple(by_identity.get(id(tensor)) for tensor in own)
