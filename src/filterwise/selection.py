"""Which weight layers of a model a recipe's method goes to, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from filterwise import balance
from filterwise.errors import ConversionError
from filterwise.filters import CONVOLUTIONS, TRANSPOSED, layout_of, weight_name
from filterwise.host import base_class, converted, is_converted, state_of
from filterwise.identify import standardizes

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.graph import Flow
    from filterwise.methods.method import Method

__all__ = [
    "SMALLEST_FAN_IN",
    "Selector",
    "WeightLayer",
    "chooses",
    "keep_reason",
    "owners_of",
    "read_behind",
    "refusal",
    "whole_refusal",
    "why_not_changed",
]

Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""A shell pattern on the dotted name, a list of them, or a predicate ``(name, module) -> bool``."""

SMALLEST_FAN_IN = 16


WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DDP: a gain added behind it would never be reduced",
    "FullyShardedDataParallel": "FSDP",
    "OptimizedModule": "torch.compile",
    "ScriptModule": "TorchScript",
    "RecursiveScriptModule": "TorchScript",
}


@dataclass(frozen=True)
class WeightLayer:
    """A parameter that a method could take.

    Attributes:
        name: Dotted name of the layer; of the parameter, where the layer is not a convolution or
            linear layer (``attn.in_proj_weight``).
        module_name: Dotted name of the module that owns it.
        module: That module.
        parameter: The parameter's name in the module.
    """

    name: str
    module_name: str
    module: nn.Module
    parameter: str

    @property
    def weight(self) -> Tensor:
        """The raw weight."""
        return getattr(self.module, self.parameter)

    @property
    def fan_in(self) -> int:
        """Weights in one filter."""
        return layout_of(self.module, self.parameter).fan_in(self.weight.shape)

    @property
    def filters(self) -> int:
        """Number of filters."""
        return layout_of(self.module, self.parameter).filters(self.weight.shape)

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[WeightLayer]:
        """Return the weight layers that one module is: one, several (by parameter), or none."""
        if weight_name(module):
            return [cls(name, name, module, "weight")]
        prefix = f"{name}." if name else ""
        return [
            cls(prefix + own, name, module, own)
            for own, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() >= 2 and parameter.is_floating_point()
        ]


def chooses(
    selector: Selector, word: str, names: Sequence[str]
) -> Callable[[str, nn.Module], bool]:
    """Return a selector as a predicate.

    Args:
        selector: Pattern, patterns or predicate.
        word: ``"select"`` or ``"exclude"``, for messages.
        names: Dotted names that the selector will be asked about.

    Raises:
        ConversionError: If a pattern matches none of the names, since that is a typo.
        TypeError: If the selector is none of these.
    """
    if callable(selector):
        return selector
    patterns = [selector] if isinstance(selector, str) else selector
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(
            f"{word} must be a name pattern, a list of them, or a predicate (name, module) -> bool,"
            f" got {selector!r}"
        )
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        inside = [name for name in names if name.startswith(pattern.rstrip(".*") + ".")]
        near = [f"{pattern.rstrip('.*')}.*"] if inside else get_close_matches(pattern, names, n=3)
        what = "weight layers" if word == "select" else "weight layers and norms"
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise ConversionError(
            f"{word}={pattern!r} matches none of the {len(names)} {what}.{hint}"
            " Patterns are shell patterns on the whole dotted name. The model is unchanged."
        )
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)


def keep_reason(layer: WeightLayer, flow: Flow) -> str | None:
    """Return which default rule leaves a layer alone, or None."""
    module = layer.module
    if isinstance(module, nn.Linear):
        return "linear layer; select= takes it"
    if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return "not a convolution; select= takes it by the parameter's name"
    if module.groups > 1 and module.in_channels == module.groups:
        return "depthwise: one input channel a group"
    if flow.is_last(layer.module_name):
        return "classifier or predictor: no weight layer or norm follows"
    if layer.fan_in < SMALLEST_FAN_IN:
        return f"fan-in {layer.fan_in} is below {SMALLEST_FAN_IN}"
    return None


def owners_of(model: nn.Module, name: str) -> list[nn.Module]:
    """Return a module by its dotted name, and all modules around it, the outermost first."""
    words = name.split(".") if name else []
    names = [".".join(words[:length]) for length in range(len(words) + 1)]
    return [model.get_submodule(one) for one in names]


def read_behind(module: nn.Module, owners: Sequence[nn.Module]) -> str | None:
    """Return which module around a layer reads its raw weight in place of calling it, or None."""
    for owner in owners:
        inner = isinstance(owner, nn.MultiheadAttention) and owner is not module
        if inner or isinstance(owner, nn.TransformerEncoderLayer):
            name = type(owner).__name__
            return f"is read by {name} behind its back, so that a method would have no effect"
    return None


def refusal(
    layer: WeightLayer, method: Method, owners: Sequence[nn.Module], *, preserve: bool = False
) -> str | None:
    """Return why a selected layer cannot be converted, or None; the way out is named.

    Args:
        layer: The layer.
        method: What it would get.
        owners: The layer's module and all modules around it.
        preserve: Whether it gets a gain and an offset that its method may not have.
    """
    module = layer.module
    kind = base_class(module).__name__
    if is_converted(module):
        return f"is already converted to {state_of(module).method}"
    adopt = "adopt_(model) makes it a filterwise layer that computes the same"
    if layer.parameter == "weight" and standardizes(module):
        return f"normalizes its weight itself ({kind}), which would be done twice; {adopt}"
    if parametrize.is_parametrized(module):
        return "is parametrized; remove the parametrization first"
    if layer.parameter not in module._parameters:
        return "computes its weight (pruned); remove that first"
    if type(module).forward is nn.Module.forward:
        return "belongs to a module without a forward of its own, so that a method has no effect"
    if not layer.weight.is_floating_point():
        return f"has a weight of {layer.weight.dtype}"
    if reader := read_behind(module, owners):
        return reader
    prefix = "" if layer.parameter == "weight" else f"{layer.parameter}_"
    added = ["gain"] if method.has_gain or preserve else []
    added += ["offset"] if method.has_offset or (preserve and method.shifts) else []
    added = [prefix + role for role in added]
    added += balance.BUFFERS if method.uses_input else ()
    taken = [name for name in added if hasattr(module, name)]
    if taken:
        return f"already has an attribute {taken[0]}"
    if method.uses_input and isinstance(module, TRANSPOSED):
        return method.refuses(layer.weight.shape, layout_of(module))
    if method.uses_input and (reason := balance.refusal(module)):
        return reason
    return method.refuses(tuple(layer.weight.shape), layout_of(module, layer.parameter))


def why_not_changed(model: nn.Module) -> str | None:
    """Return why layers of a model cannot be changed in place (it is wrapped, lazy), or None."""
    for name, module in model.named_modules():
        wrapper = WRAPPERS.get(type(module).__name__)
        if wrapper:
            where = f" at {name}" if name else ""
            return f"is wrapped{where} ({wrapper}); convert the inner model first, then wrap it"
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        return f"has parameters without a shape yet ({lazy[0]}, lazy); run it once, then convert it"
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    if sharded:
        return "is sharded (FSDP2); convert it before fully_shard"
    return None


def whole_refusal(model: nn.Module, *, preserve: bool = False) -> str | None:
    """Return why a model cannot be converted as a whole, or None; the way out is named.

    Args:
        model: The model.
        preserve: Whether its function is to be kept.
    """
    if reason := why_not_changed(model):
        return reason
    if preserve and any(parameter.is_meta for parameter in model.parameters()):
        return "is on the meta device and has no values to preserve; load them, then convert it"
    layers = list(converted(model))
    if not layers:
        return None
    state = state_of(layers[0][1])
    recipe = state.recipe
    if state.origin is not None:
        return (
            f"holds adopted layers ({len(layers)}, first: {layers[0][0]}, {recipe!r}); convert"
            " fold(model), whose layers are plain and have the weights that these compute with"
            " (to mix methods, convert submodules one by one)"
        )
    return (
        f"is already converted ({len(layers)} layers, {recipe!r}; first:"
        f" {layers[0][0] or type(model).__name__}); call unconvert_(model) to get its raw"
        " weights back, then convert_ again (to mix methods, convert submodules one by one)"
    )
