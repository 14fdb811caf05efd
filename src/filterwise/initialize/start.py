"""New values for a model, collected with their reasons before any of them is written."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from filterwise import host
from filterwise.errors import ConversionError
from filterwise.filters import layout_of, weight_name
from filterwise.report import Report, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.methods.method import Method

__all__ = ["Layer", "Start", "refused", "restored"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A converted layer, or a plain convolution or linear layer.

    Attributes:
        name: Dotted name of the module.
        module: The module.
        parameter: Name of its raw weight.
        method: Its method; None for a plain layer.
    """

    name: str
    module: nn.Module
    parameter: str
    method: Method | None

    @property
    def where(self) -> str:
        """Name, type and method, for messages."""
        kind = host.base_class(self.module).__name__
        return f"{self.name or 'the model'} ({kind}, {self.method or 'not converted'})"

    @property
    def weight(self) -> Any:
        """The raw weight."""
        return getattr(self.module, self.parameter)

    @property
    def layout(self) -> FilterLayout:
        """Where its filters lie."""
        if self.method is not None:
            return host.state_of(self.module).layout
        return layout_of(self.module, self.parameter)

    @property
    def fan_in(self) -> int:
        """Weights in one filter."""
        return self.layout.fan_in(self.weight.shape)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, if it has one."""
        return self.module._parameters.get("bias")

    @property
    def gain(self) -> Tensor | None:
        """The layer's gain, if its method has one."""
        return None if self.method is None else host.gain_of(self.module)

    @property
    def offset(self) -> Tensor | None:
        """The layer's offset, if its method has one."""
        return None if self.method is None else host.offset_of(self.module)

    def first_gain(self, weight: Tensor | None = None) -> Tensor:
        """Return the gain with which the method starts on this weight, the raw one if None."""
        if self.method is None:
            raise TypeError("a plain layer has no gain")
        raw = self.weight.detach() if weight is None else weight
        return self.method.gain_start(self.layout.matrix(raw))


@dataclass
class Start:
    """What an initialization will do.

    Attributes:
        model: The model.
        layers: Its weight layers, in the order of registration.
        values: Tensors and their new values.
        reasons: What is set, by layer.
        kept: Why a layer is left as it is, where it is not for the reason `otherwise`.
        otherwise: Why the other layers are left as they are.
        notes: Sentences on the whole.
    """

    model: nn.Module
    layers: list[Layer] = field(init=False)
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    reasons: dict[Layer, str] = field(default_factory=dict)
    kept: dict[Layer, str] = field(default_factory=dict)
    otherwise: str = ""
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Find the layers."""
        self.layers = list(_layers(self.model))

    @property
    def converted(self) -> list[Layer]:
        """The converted layers."""
        return [layer for layer in self.layers if layer.method is not None]

    def set(self, target: Tensor | None, value: Tensor | float) -> None:
        """Note a new value for a parameter or buffer; nothing where there is none."""
        if target is not None:
            value = value if isinstance(value, torch.Tensor) else torch.full_like(target, value)
            # An adopted layer's gain can be (filters, 1, 1, 1).
            self.values.append((target, value.detach().reshape(target.shape)))

    def commit(self) -> None:
        """Write all values, or none."""
        before = [(target, target.detach().clone()) for target, _ in self.values]
        try:
            _write(self.values)
        except BaseException:
            _write(before)
            raise

    def report(self) -> Report:
        """Return a row for each layer."""
        rows = []
        for layer in self.layers:
            own = "" if layer.parameter == "weight" else f".{layer.parameter}"
            rows.append(
                Row(
                    f"{layer.name}{own}".lstrip("."),
                    host.base_class(layer.module).__name__,
                    "convert" if layer in self.reasons else "keep",
                    str(layer.method) if layer.method else None,
                    self.reasons.get(layer) or self.kept.get(layer, self.otherwise),
                    layer.fan_in,
                    layer.layout.filters(layer.weight.shape),
                )
            )
        return Report(rows, self.notes, verb="set")


def _layers(model: nn.Module) -> Iterator[Layer]:
    for name, module in model.named_modules():
        if host.is_converted(module):
            state = host.state_of(module)
            layer = Layer(name, module, state.parameter, state.method)
        elif weight_name(module):
            layer = Layer(name, module, "weight", None)
        else:
            continue
        if is_lazy(layer.weight):
            raise refused(f"{layer.where} is lazy and has seen no input; run the model once first")
        yield layer


def _write(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for target, value in values:
            target.copy_(value)


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Give tensors their values back in the end."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        _write(before)


def refused(text: str) -> ConversionError:
    """Return the error that refuses an initialization; nothing has been written by then."""
    return ConversionError(f"{text}. The model is unchanged.")
