"""The family kernel in plain torch operations: the oracle, on any device.

Every filter is shifted by its first weight (so that a mean of 1e7 standard deviations costs
nothing) and divided by its reach (so that no square over- or underflows) before anything is summed.
Statistics are in float32 or wider. The backward is the closed form (specification, section 7.1);
five numbers per filter are kept for it, never a second weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.kernel.family import Family, Gradients, Layer

__all__ = ["Statistics", "backward", "compute", "differentiate", "forward"]


class Statistics(NamedTuple):
    """What is known of each filter; every tensor broadcasts against the weight's view.

    Lengths are measured in `unit`, so that none of them leaves the range of the dtype.
    """

    pivot: Tensor
    """The filter's first weight; 0 where the filter's own zero counts."""
    unit: Tensor
    """Largest distance of a weight from the pivot; 1 if that is 0."""
    mean: Tensor
    """Mean of the shifted filter."""
    root: Tensor
    """Square root of the second moment, with n - 1 in place of n where the method says so."""
    divisor: Tensor
    """1/f; where that is 0, the effective weight is 0 by rule."""


def _statistics(view: Tensor, dims: tuple[int, ...], family: Family, *, smooth: bool) -> Statistics:
    # Pivot and unit cancel in every formula, so a second derivative need not pass through them.
    constant = view.detach()
    if family.moment == "raw":
        pivot = constant.new_zeros(())
    else:
        pivot = constant
        for dim in dims:
            pivot = pivot.narrow(dim, 0, 1)
    unit = (constant - pivot).abs().amax(dims, keepdim=True)
    unit = torch.where(unit == 0, 1.0, unit)
    shifted = (view - pivot) / unit
    if family.moment == "raw":
        mean = unit.new_zeros(())
    else:
        mean = shifted.mean(dims, keepdim=True)
        shifted = shifted - mean
    moment = (shifted * shifted).mean(dims, keepdim=True)
    if family.ddof:
        moment = moment * _unbiased(view, dims)
    root = _smooth_root(moment) if smooth else moment.sqrt()
    return Statistics(pivot, unit, mean, root, _divisor(root, unit, family))


def _unbiased(view: Tensor, dims: tuple[int, ...]) -> float:
    fan_in = _fan_in(view, dims)
    return fan_in / (fan_in - 1)


def _fan_in(view: Tensor, dims: tuple[int, ...]) -> int:
    return math.prod([view.shape[dim] for dim in dims])


def _smooth_root(moment: Tensor) -> Tensor:
    """Take the root with a derivative of 0 at 0, where autograd's is infinite and ends in NaN."""
    empty = moment == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, moment).sqrt())


def _divisor(root: Tensor, unit: Tensor, family: Family) -> Tensor:
    """Return 1/f in units: no square of it is ever formed."""
    if family.scale == "none":
        return 1 / unit
    if family.scale == "outside":
        return root + family.eps / unit
    floor = math.sqrt(family.eps) / unit
    if family.scale == "max":
        return torch.maximum(root, floor)
    return root if family.eps == 0 else torch.hypot(root, floor)


def _factor(statistics: Statistics, family: Family, gain: Tensor | None) -> Tensor:
    """Return gain times constant times f, in units."""
    divisor = statistics.divisor
    if family.eps == 0 and family.scale != "none":
        zero = divisor == 0
        factor = torch.where(zero, 0.0, family.constant / torch.where(zero, 1.0, divisor))
    else:
        factor = family.constant / divisor
    return factor if gain is None else factor * gain


def _curvature(statistics: Statistics, family: Family, unbiased: float) -> Tensor | None:
    """Return h = -2 f'/f of the specification, in units; None where nothing is divided."""
    root, divisor = statistics.root, statistics.divisor
    if family.scale == "none":
        return None
    if family.scale == "max":
        above = (root == divisor) & (root > 0)
        return torch.where(above, unbiased / torch.where(above, root * root, 1.0), 0.0)
    if family.scale == "root":
        square = divisor * divisor
        return unbiased / (square if family.eps > 0 else torch.where(square == 0, 1.0, square))
    square = root * divisor
    return torch.where(root == 0, 0.0, unbiased / torch.where(square == 0, 1.0, square))


def _deviation(view: Tensor, statistics: Statistics, *, centre: bool) -> Tensor:
    if not centre:
        return view / statistics.unit
    return (view - statistics.pivot) / statistics.unit - statistics.mean


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, saturating a finite number that the narrower dtype cannot hold."""
    limit = torch.finfo(dtype).max
    if torch.finfo(values.dtype).max <= limit:
        return values.to(dtype)
    return torch.where(values.isfinite(), values.clamp(-limit, limit), values).to(dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def compute(
    layer: Layer, dtype: torch.dtype | None = None, *, smooth: bool = False
) -> tuple[Tensor, Statistics]:
    """Compute one effective weight by plain operations, and the statistics its backward needs.

    Args:
        layer: The layer.
        dtype: The effective weight's; None is the weight's.
        smooth: Make every operation differentiable where the filter is constant, at a small cost.

    Returns:
        The effective weight in the weight's shape, device and (where dense) strides, and the
        statistics.

    Cost: about eight passes over the weight, and six for its backward.
    """
    weight, family, layout, gain, offset = layer
    view, dims = layout.split(_wide(weight))
    statistics = _statistics(view, dims, family, smooth=smooth)
    gains = None if gain is None else layout.per_filter(gain.to(view.dtype), view)
    out = _deviation(view, statistics, centre=family.centre)
    out = out * _factor(statistics, family, gains)
    if offset is not None:
        out = out + layout.per_filter(offset.to(view.dtype), view)
    return layout.join(_cast(out, dtype or weight.dtype)), statistics


def differentiate(
    layer: Layer,
    statistics: Statistics | None,
    gradient: Tensor,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Take the gradient of one effective weight to its weight, gain and offset.

    Args:
        layer: The layer.
        statistics: What `compute` gave; None takes them again, as part of the graph, which is what
            a second derivative has to pass through.
        gradient: Gradient of the effective weight, in its shape.
        needs: Which of the three are wanted.
    """
    weight, family, layout, gain, offset = layer
    view, dims = layout.split(_wide(weight))
    if statistics is None:
        statistics = _statistics(view, dims, family, smooth=True)
    outer = layout.split(gradient.to(view.dtype))[0]
    deviation = _deviation(view, statistics, centre=family.centre)
    inner = (outer * deviation).sum(dims, keepdim=True)
    to_weight = to_gain = to_offset = None
    if needs[0]:
        gains = None if gain is None else layout.per_filter(gain.to(view.dtype), view)
        unbiased = _unbiased(view, dims) if family.ddof else 1.0
        curvature = _curvature(statistics, family, unbiased)
        push = outer - outer.mean(dims, keepdim=True) if family.centre else outer
        if curvature is not None:
            direction = deviation
            if family.moment == "central" and not family.centre:
                direction = _deviation(view, statistics, centre=True)
            push = push - direction * (inner * curvature / _fan_in(view, dims))
        push = push * (_factor(statistics, family, gains) / statistics.unit)
        to_weight = layout.join(_cast(push, weight.dtype))
    if gain is not None and needs[1]:
        to_gain = (inner * _factor(statistics, family, None)).reshape(gain.shape)
        to_gain = _cast(to_gain, gain.dtype)
    if offset is not None and needs[2]:
        to_offset = _cast(outer.sum(dims).reshape(offset.shape), offset.dtype)
    return to_weight, to_gain, to_offset


def forward(layers: Sequence[Layer], outs: Sequence[Tensor]) -> list[Statistics]:
    """Write the effective weight of every layer into its tensor (see `filterwise.kernel`)."""
    saved: list[Statistics] = []
    for layer, out in zip(layers, outs, strict=True):
        effective, statistics = compute(layer, out.dtype)
        out.copy_(effective)
        saved.append(statistics)
    return saved


def backward(
    layers: Sequence[Layer],
    saved: Sequence[Statistics | None],
    gradients: Sequence[Tensor],
    *,
    in_place: bool,
) -> list[Gradients]:
    """Return the gradients of every layer (see `filterwise.kernel`).

    Where another kernel went forward, its numbers are not known here and None stands for them.
    """
    done: list[Gradients] = []
    for layer, kept, gradient in zip(layers, saved, gradients, strict=True):
        to_weight, to_gain, to_offset = differentiate(layer, kept, gradient)
        assert to_weight is not None
        if in_place and gradient.dtype == to_weight.dtype:
            to_weight = gradient.copy_(to_weight)
        done.append((to_weight, to_gain, to_offset))
    return done
