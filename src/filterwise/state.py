"""What a converted layer knows of its conversion, and the effective weight it computes with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from filterwise import balance
from filterwise.keeping import Computation, Keeper, can_keep, compute
from filterwise.methods.equinorm import EquilibriumNormalization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from filterwise.filters import FilterLayout
    from filterwise.kernel import Kernel
    from filterwise.methods.method import Method

__all__ = [
    "STATE",
    "HostState",
    "Origin",
    "effective_weight",
    "gain_of",
    "homes_of",
    "inputs_of",
    "is_converted",
    "keeper_of",
    "offset_of",
    "rename_keys",
    "state_of",
]

STATE = "_filterwise"


class Origin(Protocol):
    """What an adopted layer was in its own library, and how it becomes that again."""

    @property
    def kind(self) -> str:
        """Name of the class it had."""
        ...

    @property
    def keys(self) -> Mapping[str, str]:
        """Keys of its former checkpoints, and the names in the layer that they go to now."""
        ...

    def restore(self, module: nn.Module) -> None:
        """Make the layer, which has its plain class and its own parameters, what it was."""
        ...


@dataclass
class HostState:
    """What a converted layer knows of its conversion; never in a checkpoint's tensors.

    Attributes:
        method: The method with its options.
        parameter: Name of the raw weight in the layer, nearly always ``"weight"``.
        layout: Where its filters lie.
        recipe: The recipe that converted it, for messages.
        kernel: Which implementation computes the effective weight.
        label: The layer's dotted name where it was converted, for messages.
        adds_bias: Whether the method gave the layer a bias it did not have.
        assigning: True while a checkpoint is loaded, when the raw weight may be a new parameter.
        loaded: What the last load found in place of these options, until it was said.
        loaded_as: The layer's prefix in that load.
        absent: What it did not find of the method's parameters and buffers, likewise.
        looked: Modes in which an EquiNorm layer's first batch was looked at.
        sharded: Whether the raw weight was ever a shard of FSDP, which cannot be kept.
        keeps: Whether effective weights are kept in evaluation.
        keeper: What the layer keeps, once it does; never copied with the layer.
        watcher: Is shown every effective weight that a forward computes with; never copied either.
        preserve: Whether it was converted with ``preserve=True``: where its method has no gain or
            no offset, buffers serve, so that the effective weight could start as the raw one.
        gain: Name in the layer of the gain, a parameter or buffer; None if it has none. By default
            what the method says; a layer can also have gains that its method does not.
        offset: Name of the offset, likewise.
        origin: What the layer was, if it was adopted from another library; gain and offset are then
            the layer's own.
        sources: The tensors that make the effective weight: raw weight, gain, offset.
    """

    method: Method
    parameter: str
    layout: FilterLayout
    recipe: str
    kernel: Kernel = "auto"
    label: str = ""
    adds_bias: bool = False
    assigning: bool = False
    loaded: str | None = None
    loaded_as: str = ""
    absent: tuple[str, ...] = ()
    looked: set[str] = field(default_factory=set)
    sharded: bool = False
    keeps: bool = True
    keeper: Keeper | None = None
    watcher: Callable[[Tensor], None] | None = None
    preserve: bool = False
    gain: str | None = None
    offset: str | None = None
    origin: Origin | None = None
    sources: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Name the tensors once; a forward reads them every time."""
        method, preserve = self.method, self.preserve
        if self.gain is None and (method.has_gain or preserve):
            self.gain = self.name("gain")
        if self.offset is None and (method.has_offset or (preserve and method.shifts)):
            self.offset = self.name("offset")
        self.sources = tuple(filter(None, (self.parameter, self.gain, self.offset)))

    @property
    def computation(self) -> Computation:
        """How the effective weight is computed from `sources`."""
        roles = ("gain",) * (self.gain is not None) + ("offset",) * (self.offset is not None)
        return Computation(self.method, self.layout, self.kernel, roles)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies and pickles what is kept."""
        return {**self.__dict__, "keeper": None, "watcher": None}

    def forget(self, *, buffers: bool = True) -> None:
        """Drop kept weights; what was gathered on them stays (`Keeper.forget`)."""
        if self.keeper is not None:
            self.keeper.forget(buffers=buffers)

    def name(self, role: str) -> str:
        """Return the attribute that holds a gain, an offset or a statistic of this layer."""
        return role if self.parameter == "weight" else f"{self.parameter}_{role}"


def is_converted(module: nn.Module) -> bool:
    """Tell whether this very module is a converted layer."""
    return STATE in module.__dict__


def state_of(module: nn.Module) -> HostState:
    """Return what a converted layer knows of its conversion.

    Raises:
        ValueError: If the module is not converted.
    """
    state = module.__dict__.get(STATE)
    if state is None:
        raise ValueError(f"{type(module).__name__} is not a converted layer")
    return state


def keeper_of(module: nn.Module) -> Keeper:
    """Return what keeps a converted layer's weights, made on first use."""
    state = state_of(module)
    if state.keeper is None:
        # Apart from the state, which holds it: a cycle would keep buffers until the collector runs.
        state.keeper = Keeper(state.computation, state.sources)
    return state.keeper


def gain_of(module: nn.Module) -> Tensor | None:
    """Return a converted layer's gain, one number per filter in any shape; None if it has none."""
    name = state_of(module).gain
    return None if name is None else getattr(module, name)


def offset_of(module: nn.Module) -> Tensor | None:
    """Return a converted layer's offset likewise."""
    name = state_of(module).offset
    return None if name is None else getattr(module, name)


def inputs_of(module: nn.Module) -> tuple[Tensor, ...]:
    """Return all that a converted layer's effective weight is made from, the raw weight first.

    Then come gain and offset where there are any, and EquiNorm's statistics.
    """
    state = state_of(module)
    parameters = module._parameters
    tensors = []
    for name in state.sources:
        tensor = parameters.get(name)
        tensors.append(getattr(module, name) if tensor is None else tensor)
    if state.method.uses_input:
        tensors += [
            value for name in balance.BUFFERS if (value := module._buffers.get(name)) is not None
        ]
    return tuple(tensors)


def homes_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield the dictionary, name and value of each tensor that `inputs_of` gives."""
    names = [*state_of(module).sources, *balance.BUFFERS]
    for home in (module._parameters, module._buffers, module.__dict__):
        for name in names:
            value = home.get(name)
            if isinstance(value, torch.Tensor):
                yield home, name, value


def effective_weight(
    module: nn.Module,
    input: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    shown: bool = True,
) -> Tensor:
    """Return what a converted layer computes with, as part of the graph.

    Args:
        module: A converted layer.
        input: The layer's input. Only EquiNorm in training reads it (and then updates its running
            mean); in evaluation, or without an input, EquiNorm takes the running mean.
        dtype: What it will be used in, written at once where it can be; None is the raw weight's.
        shown: Whether the layer's watcher, if it has one, is to see it.

    Returns:
        Tensor of the raw weight's shape and strides. Inside `defer`, and without gradient in
        evaluation, it is a kept weight, which the next step may write over: clone it to keep it.
    """
    state = state_of(module)
    if shown and state.watcher is not None:
        weight = effective_weight(module, input, dtype, shown=False)
        state.watcher(weight)
        return weight
    keeper = None if torch.compiler.is_dynamo_compiling() else state.keeper
    if keeper is not None and dtype is None:
        quick = None
        if torch.is_grad_enabled():
            quick = keeper.handed(module._parameters, module._buffers)
        elif not module.training:
            quick = keeper.unmoved(module._parameters)
        if quick is not None:
            return quick
    tensors = inputs_of(module)
    held = _held(module, state, tensors, dtype)
    if held is not None:
        return held
    method = state.method
    if isinstance(method, EquilibriumNormalization):
        return balance.effective_weight(
            module, method, tensors[0], gain_of(module), input, offset_of(module)
        )
    return compute(state.computation, tensors, dtype)


def _held(
    module: nn.Module, state: HostState, tensors: tuple[Tensor, ...], dtype: torch.dtype | None
) -> Tensor | None:
    """Return the kept weight where one may be used; None asks for the ordinary way."""
    if torch.compiler.is_compiling():  # versions and addresses cannot be guarded in a graph
        return None
    keeper = state.keeper
    if torch.is_grad_enabled():
        return None if keeper is None else keeper.with_gradient(tensors)
    if keeper is not None:
        held = keeper.without_gradient(tensors)
        if held is not None:
            return held
    if module.training or not state.keeps or state.sharded:
        return None
    first = state.method.uses_input and "evaluation" not in state.looked
    if first or not can_keep(tensors):
        return None
    return keeper_of(module).at_rest(tensors, dtype)


def rename_keys(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give keys of an adopted layer's former form, and gains of another shape, this layer's."""
    state = state_of(module)
    if state.origin is not None:
        for old, new in state.origin.keys.items():
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
    for name in filter(None, (state.gain, state.offset)):
        values, own = state_dict.get(prefix + name), getattr(module, name)
        if values is not None and values.shape != own.shape and values.numel() == own.numel():
            state_dict[prefix + name] = values.reshape(own.shape)
