"""Which layers of a model are looked at, and how their weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from filterwise.filters import check_module, layout_of, weight_name
from filterwise.host import converted, gain_of, inputs_of, is_converted, state_of, weight_label
from filterwise.keeping import compute

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from filterwise.filters import FilterLayout

    Layers = str | Sequence[str] | Callable[[str, nn.Module], bool]

__all__ = ["Layer", "as_wide", "chosen_layers", "inner", "refuse"]


@dataclass(frozen=True)
class Layer:
    """A weight layer that is looked at.

    Attributes:
        name: Dotted name; of the parameter, where that is not ``weight``.
        path: Dotted name of the raw weight.
        module: The layer.
        parameter: Name of the raw weight in it.
        layout: Where the filters lie.
    """

    name: str
    path: str
    module: nn.Module
    parameter: str
    layout: FilterLayout

    @property
    def weight(self) -> Tensor:
        """The raw weight."""
        return getattr(self.module, self.parameter)

    @property
    def filters(self) -> int:
        """How many filters there are."""
        return self.layout.filters(self.weight.shape)

    @property
    def inputs(self) -> int | None:
        """How many channels the input has; None where the layer is no convolution or linear."""
        if weight_name(self.module) is None or self.parameter != "weight":
            return None
        if isinstance(self.module, nn.Linear):
            return self.module.in_features
        return int(self.module.in_channels)  # pyright: ignore[reportArgumentType]

    @property
    def is_converted(self) -> bool:
        """Whether its effective weight is not its raw weight."""
        return is_converted(self.module)

    @property
    def is_centred(self) -> bool:
        """Whether the mean of a raw filter has no part in the effective one."""
        if not self.is_converted:
            return False
        method = state_of(self.module).method
        return bool(method.centred or method.uses_input)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the raw weight's shape as filter matrix, in float32 or wider."""
        return as_wide(self.layout.matrix(tensor.detach()))

    def gain(self) -> Tensor | None:
        """Return the gains, one a filter; None if there are none."""
        gain = gain_of(self.module) if self.is_converted else None
        return None if gain is None else as_wide(gain.detach().flatten())

    def effective(self) -> Tensor:
        """Return the filter matrix that the layer computes with: EquiNorm's by its running means.

        It shares no storage with what is kept.
        """
        if not self.is_converted:
            return self.matrix(self.weight)
        with torch.no_grad():
            values = compute(state_of(self.module).computation, inputs_of(self.module))
        return self.matrix(values)


def as_wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inner(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """Return the model inside a DDP wrapper, and the wrapper.

    Raises:
        TypeError: If it is no module.
    """
    check_module(model)
    if isinstance(model, DistributedDataParallel):
        return model.module, model
    return model, None


def refuse(model: nn.Module) -> None:
    """Refuse a model whose layers cannot be watched.

    Raises:
        ValueError: If it is compiled, scripted, sharded or replicated; it is unchanged.
    """
    for name, module in model.named_modules():
        why = _why_not(module)
        if why is not None:
            where = f"{name} ({type(module).__name__})" if name else type(module).__name__
            raise ValueError(f"{where} cannot be watched: {why} The model is unchanged.")


def _why_not(module: nn.Module) -> str | None:
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return (
            "it is compiled, and hooks that come later are not in its graph. Watch the model before"
            " torch.compile, or an uncompiled copy that loads its state."
        )
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript. Watch the Python model."
    if isinstance(module, nn.DataParallel):
        return "DataParallel computes on copies. Use DistributedDataParallel, or its .module."
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        if is_lazy(parameter) or parameter.is_meta:
            return "it has no values yet. Run one batch, or load a state, first."
        if any(cls.__name__ in ("DTensor", "FlatParameter") for cls in type(parameter).__mro__):
            return "its weights are sharded, and no process has whole filters."
    return None


def chosen_layers(model: nn.Module, layers: Layers | None = None) -> list[Layer]:
    """Return the layers to look at, in registration order.

    Args:
        model: The model, without a wrapper.
        layers: Shell pattern on the dotted name, a list of them, or a predicate
            ``(name, module) -> bool``. None takes every convolution, linear and converted layer.

    Raises:
        ValueError: If a pattern matches nothing, since that is a typo, or nothing is chosen.
        TypeError: If it is none of these.
    """
    found: list[Layer] = []
    hosted = dict(converted(model))
    for name, module in model.named_modules():
        if name in hosted and hosted[name] is module:
            state = state_of(module)
            label = weight_label(name, module)
            path = f"{name}.{state.parameter}".lstrip(".")
            found.append(Layer(label, path, module, state.parameter, state.layout))
        elif weight_name(module) is not None:
            path = f"{name}.weight".lstrip(".")
            found.append(Layer(name, path, module, "weight", layout_of(module)))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no convolution, linear or converted layer to look at."
        )
    if layers is None:
        return found
    if callable(layers):
        found = [one for one in found if layers(one.name, one.module)]
        if not found:
            raise ValueError("layers= has chosen none of the model's weight layers.")
        return found
    return _matching(found, [layers] if isinstance(layers, str) else layers)


def _matching(found: list[Layer], patterns: Sequence[str]) -> list[Layer]:
    if not all(isinstance(one, str) for one in patterns):
        raise TypeError(f"layers must be names or patterns, got {patterns!r}")
    names = [one.name for one in found]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3) or names[:3]
            raise ValueError(
                f"layers={pattern!r} matches none of the {len(names)} weight layers. Nearest:"
                f" {', '.join(near)}. Patterns are shell patterns on the whole dotted name."
            )
    return [one for one in found if any(fnmatchcase(one.name, pattern) for pattern in patterns)]
