"""Which modules may compute their weight themselves, and which of their tensors it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from filterwise.filters import CONVOLUTIONS, TRANSPOSED, FilterLayout, layout_of
from filterwise.state import is_converted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NAMES", "Subject", "subject_of", "tensor_at"]

GAINS = ("gain", "weight_gamma", "alpha", "WNScale")
OFFSETS = ("weight_beta",)

NAMES = frozenset(
    {
        "StdConv2d",
        "StdConv2dSame",
        "ScaledStdConv2d",
        "ScaledStdConv2dSame",
        "WeightStandardizedConv2d",
        "WeightStandardizedConv3d",
        "ConvWS2d",
        "ConvAWS2d",
        "SAConv2d",
        "WSConv1d",
        "WSConv2d",
        "WSConvTranspose2d",
        "PWSConv2d",
        "WeightStandardizer",
    }
)
"""Classes of other libraries that standardize a weight; several formulas share a name."""


@dataclass(frozen=True)
class Subject:
    """A layer whose weight may be computed, and what from.

    Attributes:
        form: Whether its class computes the weight, a parametrization of torch, or a hook of
            torch's old ``weight_norm``.
        kind: Name of the class that computes it.
        raw: Dotted name of the raw weight in the layer.
        gain: Dotted name of a tensor that may be a gain, or None.
        offset: Dotted name of a buffer that may be an offset, or None.
        axis: The axis that torch's ``weight_norm`` keeps; None elsewhere.
        hook: The hook that computes the weight, or None.
    """

    form: Literal["class", "parametrization", "hook"]
    kind: str
    raw: str = "weight"
    gain: str | None = None
    offset: str | None = None
    axis: int | None = None
    hook: Any = None

    @property
    def is_known(self) -> bool:
        """Whether the name says that the weight is normalized."""
        return self.kind in NAMES or self.axis is not None

    def raw_weight(self, module: nn.Module) -> Tensor:
        """Return the layer's raw weight."""
        return tensor_at(module, self.raw)

    def layouts(self, module: nn.Module) -> list[FilterLayout]:
        """Return where its filters may lie: by the layer's kind, else along one of two axes."""
        candidates = [layout_of(module), FilterLayout(0), FilterLayout(1)]
        if self.axis is not None:
            candidates = [FilterLayout(self.axis)] if self.axis in (0, 1) else []
        return list(dict.fromkeys(candidates))


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """Return a tensor of a module by its dotted name."""
    found: Any = module
    for word in name.split("."):
        found = getattr(found, word)
    return found


def subject_of(module: Any) -> Subject | None:
    """Return how a layer may compute its weight; None for a converted or ordinary one."""
    if is_converted(module):
        return None
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ == "WeightNorm" and hook.name == "weight":
            axis = _axis(module.weight_v, hook.dim)
            return Subject("hook", "weight_norm", "weight_v", "weight_g", axis=axis, hook=hook)
    if parametrize.is_parametrized(module, "weight"):
        return _parametrized(module)
    return _of_own_class(module)


def _axis(weight: Tensor, dim: int) -> int:
    """Return torch's axis; -1 is the whole weight, for which filterwise has no filters."""
    return dim if dim >= -1 else dim + weight.dim()


def _parametrized(module: Any) -> Subject | None:
    chain = module.parametrizations.weight
    if len(chain) != 1 or len(module.parametrizations) != 1:
        return None
    place, kind = "parametrizations.weight.", type(chain[0]).__name__
    if kind == "_WeightNorm":
        axis = _axis(chain.original1, chain[0].dim)
        return Subject(
            "parametrization", "weight_norm", f"{place}original1", f"{place}original0", axis=axis
        )
    if hasattr(chain, "original") and not list(chain[0].parameters()):
        return Subject("parametrization", kind, f"{place}original")
    return None


def _of_own_class(module: nn.Module) -> Subject | None:
    weight = module._parameters.get("weight")
    if weight is None or is_lazy(weight) or weight.dim() < 2 or not weight.is_floating_point():
        return None
    cls = type(module)
    if cls.__module__.startswith("torch.") or cls.forward is nn.Module.forward:
        return None
    if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)) and weight.dim() < 3:
        return None
    filters = {layout_of(module).filters(weight.shape), *weight.shape[:2]}
    return Subject(
        "class",
        next((one.__name__ for one in cls.__mro__ if one.__name__ in NAMES), cls.__name__),
        gain=_first(module, GAINS, filters),
        offset=_first(module, OFFSETS, filters),
    )


def _first(module: nn.Module, names: tuple[str, ...], sizes: set[int]) -> str | None:
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, torch.Tensor) and tensor.numel() in sizes:
            return name
    return None
