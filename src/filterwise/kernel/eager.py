"""The family kernel in plain torch operations: the oracle, on any device.

Every filter is divided by a power of two near its largest entry (exact, so that no square over- or
underflows) and shifted by its first entry (so that a mean of 1e7 standard deviations costs nothing)
before anything is summed. Statistics are in float32 or wider. The backward is the closed form
(specification, section 7.1); five numbers per filter are kept for it, never a second weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.kernel.family import Family

__all__ = ["standardize"]


class Statistics(NamedTuple):
    """What is known of each filter; every tensor broadcasts against the weight's view.

    Lengths are measured in `unit`, so that none of them leaves the range of the dtype.
    """

    unit: Tensor
    """Power of two near the filter's largest entry."""
    pivot: Tensor
    """The filter's first weight."""
    mean: Tensor
    """Mean of weight minus pivot."""
    factor: Tensor
    """f times unit: what a deviation is multiplied with; 0 where the divisor is 0."""
    curvature: Tensor
    """h = -2 f'/f of the specification, times unit squared; 0 where nothing is divided."""


def standardize(
    weight: Tensor,
    family: Family,
    layout: FilterLayout,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    r"""Compute the effective weight of one layer, differentiably, twice if need be.

    .. math:: \hat W = g\,k\,f(m_2)\,(W - c\,\mu) + b

    Args:
        weight: Raw weight, any shape that `layout` reads, any floating dtype and strides.
        family: The method's place in the family, for this fan-in.
        layout: Where the filters lie.
        gain: g, one number per filter, any shape of that many elements; None is 1.
        offset: b, likewise; None is 0.

    Returns:
        Tensor of the weight's shape, dtype, device and, where that is dense, strides.

    Cost: about eight passes over the weight forward and six backward.
    """
    return _Standardize.apply(weight, gain, offset, family, layout)[0]


def _power_of_two_below(peak: Tensor) -> Tensor:
    exponent = torch.frexp(peak)[1] - 1
    unit = torch.exp2(exponent.to(peak.dtype)).clamp_min(torch.finfo(peak.dtype).tiny)
    unit = torch.where(peak == 0, torch.ones_like(peak), unit)
    # One infinite weight must spoil its whole filter, visibly; frexp reads it as a small number.
    return torch.where(peak.isfinite(), unit, torch.nan)


def _statistics(view: Tensor, dims: tuple[int, ...], family: Family) -> Statistics:
    # Unit and pivot cancel in every formula, so a second derivative need not pass through them.
    constant = view.detach()
    unit = _power_of_two_below(constant.abs().amax(dims, keepdim=True))
    pivot = constant
    for dim in dims:
        pivot = pivot.narrow(dim, 0, 1)
    pivot = pivot / unit
    shifted = view / unit - pivot
    mean = shifted.mean(dims, keepdim=True)
    fan_in = math.prod([view.shape[dim] for dim in dims])
    moment = (shifted - mean if family.moment == "central" else view / unit).square()
    moment = moment.mean(dims, keepdim=True)
    unbiased = fan_in / (fan_in - 1) if family.ddof else 1.0
    factor, curvature = _scale(moment * unbiased, unit, family)
    return Statistics(unit, pivot, mean, factor, curvature * unbiased)


def _scale(moment: Tensor, unit: Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """Return f and h, both in units, from the second moment in units."""
    if family.scale == "none":
        return unit * torch.ones_like(moment), torch.zeros_like(moment)
    empty = moment == 0
    # The root of 1 stands in where there is nothing to take a root of: its derivative is finite.
    root = torch.where(empty, torch.ones_like(moment), moment).sqrt()
    floor = (family.eps if family.scale == "outside" else math.sqrt(family.eps)) / unit
    if family.scale == "outside":
        divisor = torch.where(empty, floor, root + floor)
        curvature = 1 / (root * divisor)
    elif family.scale == "root":
        divisor = torch.where(empty, floor, torch.hypot(root, floor))
        curvature = 1 / divisor / divisor
    else:
        divisor = torch.where(empty, floor, torch.maximum(root, floor))
        curvature = torch.where(root > floor, 1 / root / root, torch.zeros_like(root))
    undivided = divisor == 0
    factor = 1 / torch.where(undivided, torch.ones_like(divisor), divisor)
    zero = torch.zeros_like(factor)
    return torch.where(undivided, zero, factor), torch.where(empty, zero, curvature)


def _deviation(view: Tensor, statistics: Statistics, *, centre: bool) -> Tensor:
    scaled = view / statistics.unit
    return (scaled - statistics.pivot) - statistics.mean if centre else scaled


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast, saturating a finite number that the narrower dtype cannot hold."""
    if values.dtype == dtype:
        return values
    limit = torch.finfo(dtype).max
    return torch.where(values.isfinite(), values.clamp(-limit, limit), values).to(dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Standardize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        gain: Tensor | None,
        offset: Tensor | None,
        family: Family,
        layout: FilterLayout,
    ) -> tuple[Tensor, ...]:
        view, dims = layout.split(_wide(weight))
        statistics = _statistics(view, dims, family)
        factor = statistics.factor * family.constant
        if gain is not None:
            factor = factor * layout.per_filter(gain.to(view.dtype), view)
        out = _deviation(view, statistics, centre=family.centre) * factor
        if offset is not None:
            out = out + layout.per_filter(offset.to(view.dtype), view)
        return layout.join(_cast(out, weight.dtype)), *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight, gain, offset, ctx.family, ctx.layout = inputs
        ctx.has_gain, ctx.has_offset = gain is not None, offset is not None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        optional = [tensor for tensor in (gain, offset) if tensor is not None]
        ctx.save_for_backward(weight, *optional, *output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        incoming = gradients[0]
        if incoming is None:
            return (None,) * 5
        family, layout = ctx.family, ctx.layout
        weight, *saved = ctx.saved_tensors
        gain = saved.pop(0) if ctx.has_gain else None
        offset = saved.pop(0) if ctx.has_offset else None
        view, dims = layout.split(_wide(weight))
        # A second derivative passes through the statistics, so they must be part of the graph then.
        kept = not torch.is_grad_enabled()
        statistics = Statistics(*saved) if kept else _statistics(view, dims, family)
        outer = layout.split(incoming.to(view.dtype))[0]
        deviation = _deviation(view, statistics, centre=family.centre)
        inner = (outer * deviation).sum(dims, keepdim=True)
        needs_weight, needs_gain, needs_offset, *_ = ctx.needs_input_grad
        to_weight = to_gain = to_offset = None
        if needs_weight:
            factor = statistics.factor * family.constant / statistics.unit
            if gain is not None:
                factor = factor * layout.per_filter(gain.to(view.dtype), view)
            direction = _deviation(view, statistics, centre=family.moment == "central")
            fan_in = math.prod([view.shape[dim] for dim in dims])
            push = outer - direction * (inner * statistics.curvature / fan_in)
            if family.centre:
                push = push - outer.mean(dims, keepdim=True)
            to_weight = layout.join(_cast(push * factor, weight.dtype))
        if gain is not None and needs_gain:
            to_gain = inner * statistics.factor * family.constant
            to_gain = _cast(to_gain.reshape(gain.shape), gain.dtype)
        if offset is not None and needs_offset:
            to_offset = outer.sum(dims).reshape(offset.shape)
            to_offset = _cast(to_offset, offset.dtype)
        return to_weight, to_gain, to_offset, None, None
