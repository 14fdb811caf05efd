"""Where the filters of a weight lie in memory, for kernels that read it by address."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.filters import FilterLayout

__all__ = ["Place", "Targets", "empty_like", "in_order", "lies_as", "place_of"]


class Place(NamedTuple):
    """Geometry of a weight's filters, in elements.

    Filter ``o`` starts at ``(o // per_group) group_stride + (o % per_group) filter_stride`` and
    lies in ``fan_in / run`` runs of `run` neighbours, `run_stride` apart: one run in an ordinary
    layer, one for each input channel in a transposed convolution.
    """

    strides: tuple[int, ...]
    """Strides of every tensor of the layer: the weight's own where it is dense."""
    filters: int
    fan_in: int
    run: int
    run_stride: int
    per_group: int
    filter_stride: int
    group_stride: int


@functools.lru_cache(maxsize=4096)
def place_of(
    shape: tuple[int, ...], strides: tuple[int, ...], layout: FilterLayout
) -> Place | None:
    """Return where filters lie; None if there are none, or in no runs of equal length.

    Args:
        shape: The weight's.
        strides: The weight's. If they leave gaps or overlap, the place is that of a copy.
        layout: Where the filters lie among the axes.
    """
    if 0 in shape:
        return None
    weight = torch.empty_like(torch.empty_strided(shape, strides, device="meta"))
    view, dims = layout.split(weight)
    axes = [(view.stride(d), view.shape[d]) for d in dims if view.shape[d] != 1]
    runs: list[tuple[int, int]] = []
    for stride, size in sorted(axes):
        if runs and stride == runs[-1][0] * runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] * size)
        else:
            runs.append((stride, size))
    if not runs or runs[0][0] != 1:
        runs.insert(0, (1, 1))
    if len(runs) > 2:
        return None
    run_stride = runs[1][0] if len(runs) == 2 else 0
    if layout.axis == 0:
        per_group, filter_stride, group_stride = weight.shape[0], weight.stride(0), 0
    else:
        per_group, filter_stride, group_stride = view.shape[2], view.stride(2), view.stride(0)
    return Place(
        weight.stride(),
        layout.filters(shape),
        math.prod(size for _, size in runs),
        runs[0][1],
        run_stride,
        per_group,
        filter_stride,
        group_stride,
    )


def lies_as(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Tell whether a tensor's elements lie in memory as those strides say."""
    own = tensor.stride()
    if own == strides:
        return True
    axes = zip(tensor.shape, own, strides, strict=True)
    return all(one == other or size == 1 for size, one, other in axes)


def in_order(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the tensor, or a copy of it that lies as those strides say."""
    if lies_as(tensor, strides):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def empty_like(values: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor for the gradient of a gain or offset, where there is one."""
    if values is None:
        return None
    return torch.empty_like(values, memory_format=torch.contiguous_format)


class Targets:
    """Where results are written, tensor by tensor, and the copies that follow the kernel's call.

    A kernel writes elements in the weight's order; a tensor that lies otherwise gets a copy.
    """

    def __init__(self) -> None:
        """Start a call."""
        self.late: list[tuple[Tensor, Tensor]] = []

    def effective(self, out: Tensor, place: Place) -> Tensor:
        """Return the tensor that an effective weight is written to."""
        if lies_as(out, place.strides):
            return out
        target = out.new_empty_strided(out.shape, place.strides)
        self.late.append((out, target))
        return target

    def gradient(
        self, weight: Tensor, gradient: Tensor, place: Place, *, in_place: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the incoming gradient in order, where the weight's goes, and what the caller gets.

        The weight's gradient is written over the incoming one where that may be, and over a copy of
        it where one had to be made.
        """
        ordered = in_order(gradient, place.strides)
        if ordered.dtype != weight.dtype or (ordered is gradient and not in_place):
            target = torch.empty_like(weight)
            return ordered, target, target
        if ordered is gradient or not in_place:
            return ordered, ordered, ordered
        self.late.append((gradient, ordered))
        return ordered, ordered, gradient

    def finish(self) -> None:
        """Copy what was written elsewhere to where it belongs."""
        for out, target in self.late:
            out.copy_(target)
