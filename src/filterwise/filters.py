"""A weight of any layer, read as the filter matrix: one row per output channel.

This is the only file that knows about groups and transposed layouts (the specification's
section 0). A convolution or linear layer has its filters along axis 0. A transposed convolution of
``g`` groups keeps a weight ``(C, O/g, k...)``, and the filter of output channel ``q * (O/g) + j``
is ``weight[q * C/g : (q + 1) * C/g, j]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "CONVOLUTIONS",
    "TRANSPOSED",
    "FilterLayout",
    "check_module",
    "is_weight_layer",
    "layout_of",
    "weight_name",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class FilterLayout:
    """Where the filters of a weight lie.

    Attributes:
        axis: Axis whose index is the output channel: 0, or 1 for a transposed convolution.
        groups: Groups of a transposed convolution, whose axis 1 counts channels of one group only.
            Always 1 with ``axis=0``, where a grouped weight already has one row per channel.
    """

    axis: int = 0
    groups: int = 1

    def filters(self, shape: Sequence[int]) -> int:
        """Return the number of filters of a weight of this shape."""
        # A tracer hands out sizes as tensors; everything behind this is plain numbers.
        return int(shape[self.axis]) * self.groups

    def fan_in(self, shape: Sequence[int]) -> int:
        """Return the number of weights in one filter."""
        return math.prod([int(size) for size in shape]) // max(self.filters(shape), 1)

    def split(self, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return a view of the weight, and the axes of the view that run along a filter.

        Nothing is copied: statistics over those axes are statistics of filters in any memory
        format, and what is computed elementwise on the view keeps its strides.
        """
        if self.axis == 0:
            return weight, tuple(range(1, weight.dim()))
        view = weight.unflatten(0, (self.groups, -1))
        return view, (1, *range(3, view.dim()))

    def join(self, view: Tensor) -> Tensor:
        """Undo `split`."""
        return view if self.axis == 0 else view.flatten(0, 1)

    def per_filter(self, values: Tensor, view: Tensor) -> Tensor:
        """Shape one number per filter, ``(filters,)``, so that it broadcasts against the view."""
        shape = [1] * view.dim()
        if self.axis == 0:
            shape[0] = -1
        else:
            shape[0], shape[2] = self.groups, -1
        return values.reshape(shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the filter matrix ``(filters, fan_in)``; it may be a copy."""
        if self.axis == 0:
            return weight.flatten(1)
        view, _ = self.split(weight)
        return view.transpose(1, 2).flatten(0, 1).flatten(1)

    def fill(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return the weight, in the shape of `like`, whose filter matrix is `matrix`."""
        if self.axis == 0:
            return matrix.reshape(like.shape)
        view, _ = self.split(like)
        groups, inputs, outputs, *kernel = view.shape
        return self.join(matrix.reshape(groups, outputs, inputs, *kernel).transpose(1, 2))


def check_module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")


def layout_of(module: nn.Module, parameter: str = "weight") -> FilterLayout:
    """Return where the filters of a module's parameter lie; axis 0 unless it is transposed."""
    if parameter == "weight" and isinstance(module, TRANSPOSED):
        return FilterLayout(axis=1, groups=module.groups)
    return FilterLayout()


def weight_name(module: nn.Module) -> str | None:
    """Return ``"weight"`` for a convolution or linear layer that has one, else None."""
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
        return "weight"
    return None


def is_weight_layer(module: nn.Module) -> bool:
    """Tell whether it is a convolution, a linear layer, or owns a parameter of rank 2 or more."""
    if weight_name(module):
        return True
    parameters = module.parameters(recurse=False)
    return any(p.is_floating_point() and not is_lazy(p) and p.dim() >= 2 for p in parameters)
