"""How a converted layer computes, and how it keeps its weight.

A converted layer is an instance of a subclass made on the fly (``FilterwiseConv2d``), so
``isinstance`` stays true and exact-type tools leave it alone. Its ``weight`` is the raw weight, an
ordinary parameter under its ordinary key; gains are extra parameters. The effective weight is
computed in ``forward`` and in no state, copy or pickle.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from filterwise import balance, checkpoint
from filterwise.errors import ConversionError
from filterwise.filters import CONVOLUTIONS, TRANSPOSED, check_module, layout_of
from filterwise.keeping import watch_steps
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.state import (
    STATE,
    HostState,
    effective_weight,
    gain_of,
    homes_of,
    inputs_of,
    is_converted,
    keeper_of,
    offset_of,
    rename_keys,
    state_of,
)
from filterwise.values import first_values, own_tensors, start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from filterwise.kernel import Kernel
    from filterwise.methods.method import Method

__all__ = [
    "HostState",
    "base_class",
    "converted",
    "effective_weight",
    "gain_of",
    "homes_of",
    "inputs_of",
    "install",
    "install_state",
    "is_converted",
    "keeper_of",
    "offset_of",
    "refuse_to_take_off",
    "state_of",
    "uninstall",
    "weight_label",
]


class Hosted(nn.Module):
    """What every converted layer has beside its base class."""

    _filterwise: HostState
    _filterwise_base: type[nn.Module]

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a new parameter in place of the raw weight: it would be normalized again."""
        state = self.__dict__.get(STATE)
        if state is not None and name == state.parameter and isinstance(value, nn.Parameter):
            old = self._parameters.get(name)
            allowed = old is None or old is value or state.assigning
            if _is_distributed(old) or _is_distributed(value):
                # An unsharded weight comes back with version 0 and often at its old address.
                state.sharded = True
                state.forget()
            elif not allowed:
                raise ConversionError(
                    f"a new parameter was assigned to .{name} of a layer converted to"
                    f" {state.method}; it would be normalized again, and a fused or tied one would"
                    " not be used as it is. Write in place (weight.copy_), or call fold(model) or"
                    " unconvert_(model) first. The layer is unchanged."
                )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Name the base class, since the class made on the fly cannot be imported."""
        del protocol
        return _rebuild, (self._filterwise_base,), self.__getstate__()

    def train(self, mode: bool = True) -> Any:
        """Change the mode, and drop what was kept in the other one."""
        self._filterwise.forget(buffers=mode != self.training)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Drop what was kept; let statistics follow to a device, but not to half precision."""
        self._filterwise.forget()
        wide = {name: self._buffers[name] for name in balance.BUFFERS if name in self._buffers}
        done = super()._apply(*args, **kwargs)
        _replace_inputs(self)
        for name, before in wide.items():
            after = self._buffers[name]
            if before is None or after is None or not after.is_floating_point():
                continue
            if torch.promote_types(after.dtype, torch.float32) != after.dtype:
                self._buffers[name] = before.to(after.device)
        return done

    def extra_repr(self) -> str:
        """Return the base class's text and the method."""
        state = self._filterwise
        words = [super().extra_repr(), str(state.method)]
        if state.preserve:
            words.append("preserve=True")
        if state.parameter != "weight":
            words.append(f"on {state.parameter}")
        if state.kernel != "auto":
            words.append(f"kernel={state.kernel}")
        return ", ".join(word for word in words if word)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self._filterwise
        checkpoint.write_options(destination, prefix, state.method, state.preserve)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = self._filterwise
        state.forget()
        rename_keys(self, state_dict, prefix)
        state.assigning = True
        try:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        finally:
            state.assigning = False
            _replace_inputs(self)
        if prefix + state.parameter not in state_dict:
            return
        absent = [name for name in own_tensors(self) if prefix + name not in state_dict]
        for name in absent:
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)
        state.loaded_as = prefix
        plain = checkpoint.KEY not in local_metadata
        start(self, absent, state.preserve and plain and state.gain in absent)
        # A layer of another library has checkpoints without our options, and computes the same.
        if checkpoint.KEY in local_metadata or state.origin is None or absent:
            found = checkpoint.compare_options(local_metadata, state.method, state.preserve)
            state.loaded = found
        state.absent = tuple(absent)


def _replace_inputs(module: nn.Module) -> None:
    """Tell the keeper that parameters may have been replaced for good."""
    keeper = state_of(module).keeper
    if keeper is not None:
        keeper.replace(inputs_of(module))


def _is_distributed(value: object) -> bool:
    """Tell a DTensor, whose shards FSDP puts in place of the parameter, without importing it."""
    return any(cls.__name__ == "DTensor" for cls in type(value).__mro__)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _hosted_class(base)
    return cls.__new__(cls)


@functools.cache
def _hosted_class(base: type[nn.Module]) -> type[nn.Module]:
    if base in CONVOLUTIONS:
        forward: Any = _forward_convolution
    elif base in TRANSPOSED:
        forward = _forward_transposed
    elif base is nn.Linear:
        forward = _forward_linear
    else:
        forward = _forward_replaced
    # The base's module name keeps torch's own layers leaves of torch.fx, which would otherwise
    # trace into the forward and freeze the effective weight as a constant.
    body = {
        "forward": forward,
        "_filterwise_base": base,
        "__module__": base.__module__,
        "__doc__": f"A {base.__name__} whose weight is normalized filter by filter.",
    }
    return type(f"Filterwise{base.__name__}", (Hosted, base), body)


def _forward_convolution(self: Any, input: Tensor) -> Tensor:
    weight = effective_weight(self, input, _dtype_of_use(self))
    return self._conv_forward(input, weight, self.bias)


def _dtype_of_use(module: nn.Module) -> torch.dtype | None:
    """Return the dtype that torch's own layers compute with under autocast; None is the weight's.

    Writing the effective weight in it saves autocast a pass over the weight, and in the backward
    another.
    """
    if torch.compiler.is_compiling() or not torch._C._is_any_autocast_enabled():
        return None
    weight = getattr(module, state_of(module).parameter)
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _forward_linear(self: Any, input: Tensor) -> Tensor:
    weight = effective_weight(self, input, _dtype_of_use(self))
    return functional.linear(input, weight, self.bias)


def _forward_transposed(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    spatial = len(self.kernel_size)
    output_padding = self._output_padding(
        input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
    )
    convolve = (
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )[spatial - 1]
    weight = effective_weight(self, input, _dtype_of_use(self))
    return convolve(
        input,
        weight,
        self.bias,
        self.stride,
        self.padding,
        output_padding,
        self.groups,
        self.dilation,
    )


def _forward_replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
    weight = effective_weight(self, args[0] if args else None)
    if weight.is_leaf:
        # A forward of somebody's own may assign to `.data`, which must not reach a kept weight.
        weight = weight.view_as(weight)
    with _replaced(self, self._filterwise.parameter, weight):
        return self._filterwise_base.forward(self, *args, **kwargs)


@contextmanager
def _replaced(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Put a tensor in place of a parameter while the layer's own forward runs."""
    home: dict[str, Any] = module._parameters if name in module._parameters else module.__dict__
    raw = home[name]
    home[name] = value
    try:
        yield
    finally:
        home[name] = raw


def weight_label(name: str, module: nn.Module) -> str:
    """Return a converted layer's name in reports; the parameter's, where that is not weight."""
    parameter = state_of(module).parameter
    return name if parameter == "weight" else f"{name}.{parameter}".lstrip(".")


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class a module had before it was converted (its own, if it is plain)."""
    return module._filterwise_base if isinstance(module, Hosted) else type(module)


def converted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every converted layer, each once, in registration order."""
    check_module(model)
    for name, module in model.named_modules():
        if is_converted(module):
            yield name, module


def install(
    module: nn.Module,
    method: Method,
    parameter: str,
    recipe: str,
    kernel: Kernel = "auto",
    label: str = "",
    preserve: bool = False,
) -> None:
    """Convert one layer in place: it gets its gain and the class that computes with it.

    The caller has checked that the method suits the layer. Nothing is changed if this raises, the
    raw weight never, and no random number is drawn. With `preserve` the gain and the offset (a
    buffer where the method does not learn it) make the effective weight the raw one.
    """
    weight = getattr(module, parameter)
    layout = layout_of(module, parameter)
    state = HostState(method, parameter, layout, recipe, kernel, label, preserve=preserve)
    added: dict[str, nn.Parameter | Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        equinorm = isinstance(method, EquilibriumNormalization)
        statistics = balance.buffers(module, method, weight) if equinorm else {}
        values = first_values(state, weight.detach(), statistics.get("input_mean"), preserve)
        for name, value in values.items():
            learns = method.learns_gain if name == state.gain else method.has_offset
            added[name] = nn.Parameter(value, weight.requires_grad) if learns else value
        added |= statistics
        if equinorm and method.has_gain and module._parameters.get("bias") is None:
            state.adds_bias = True
            added["bias"] = nn.Parameter(weight.new_zeros(weight.shape[0]), weight.requires_grad)
    try:
        for name, value in added.items():
            if isinstance(value, nn.Parameter):
                module.register_parameter(name, value)
            else:
                module.register_buffer(name, value)
        install_state(module, state)
    except BaseException:
        _take_away(module, list(added))
        raise


def install_state(module: nn.Module, state: HostState) -> None:
    """Let a layer that has all it needs, of its plain class, compute by its state from now on."""
    watch_steps()  # a step's closure may be the first to defer
    cls = _hosted_class(type(module))
    module.__dict__[STATE] = state
    module.__class__ = cls


def _take_away(module: nn.Module, names: list[str]) -> None:
    module.__class__ = base_class(module)
    module.__dict__.pop(STATE, None)
    for name in names:
        if name == "bias":
            module._parameters["bias"] = None
        else:
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)


def refuse_to_take_off(model: nn.Module) -> None:
    """Refuse a model in which a converted layer was wrapped since: its class cannot go back.

    Raises:
        ConversionError: If there is one.
    """
    for name, module in converted(model):
        if "_filterwise_base" not in type(module).__dict__:
            raise ConversionError(
                f"{name or 'the model'} ({type(module).__name__}) was parametrized after it was"
                " converted; remove the parametrization first. The model is unchanged."
            )


def uninstall(module: nn.Module, *, plain: bool = False) -> None:
    """Give a converted layer the class it had, and take its gain, offset and statistics away.

    A bias that the conversion added stays: the layer's function would change without it. What was
    gathered inside `defer` is handed over. An adopted layer becomes what it was in its own library,
    with its gain.

    Args:
        module: A converted layer.
        plain: Give an adopted layer the plain class, without its gain.
    """
    state = state_of(module)
    if state.keeper is not None:
        state.keeper.release()
    if state.origin is None or plain:
        _take_away(module, [name for name in own_tensors(module) if name != "bias"])
    else:
        _take_away(module, [])
        state.origin.restore(module)
