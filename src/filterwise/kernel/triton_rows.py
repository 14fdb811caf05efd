"""The family kernel's programs for a GPU, in Triton: one program for each filter.

The formulas and rules are the eager kernel's, with its passes: mean and reach of the filter shifted
by its first weight, its second moment in units of the reach, then the writing. A filter is read
again in each pass, from a cache that still holds it. Sums are in float32, for float64 weights in
float64.
"""

# pyright: reportArgumentType=false
# What Triton takes for a type at compile time pyright takes for a value.
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK", "COLUMNS", "KEPT", "backward_rows", "forward_rows"]

BLOCK = 1024
"""Elements a program reads at a time; the same for every filter, so that a layer's result does not
depend on which layers share its launch."""

KEPT = 4
"""Numbers kept of each filter for the backward: mean, unit, factor, curvature."""

COLUMNS = (
    "first_row",
    "weight",
    "out",
    "gradient",
    "kept",
    "gain",
    "offset",
    "to_gain",
    "to_offset",
    "filters",
    "fan_in",
    "run",
    "run_stride",
    "per_group",
    "filter_stride",
    "group_stride",
    "eps",
    "constant",
    "unbiased",
)
"""A layer's row of the table: addresses, geometry, and three float64 numbers by their bits."""

WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit
def _number(layer, column, kind: tl.constexpr):
    """Return a floating-point number of the table in the dtype of the sums."""
    return tl.load(layer + column).to(tl.float64, bitcast=True).to(kind)


@triton.jit
def _start(layer, row):
    """Return where a filter starts, in elements."""
    per_group = tl.load(layer + 13)
    group = row // per_group
    return group * tl.load(layer + 15) + (row - group * per_group) * tl.load(layer + 14)


@triton.jit
def _places(block, fan_in, run, run_stride, one_run: tl.constexpr, size: tl.constexpr):
    """Return the places of a block's elements, and which of them belong to the filter."""
    index = block * size + tl.arange(0, size)
    inside = index < fan_in
    if not one_run:
        index = (index // run) * run_stride + index % run
    return index, inside


@triton.jit
def _inverse(unit, kind: tl.constexpr):
    """Return 1 / unit, rightly rounded."""
    return 1.0 / unit if kind == tl.float64 else tl.div_rn(unit * 0.0 + 1.0, unit)


@triton.jit
def _unit(reach, kind: tl.constexpr):
    """Round down to a power of two, so that dividing by it is exact; 1 if the reach is 0."""
    if kind == tl.float64:
        power = (reach.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(kind, bitcast=True)
        power = tl.maximum(power, 2.2250738585072014e-308)
    else:
        power = (reach.to(tl.int32, bitcast=True) & 0x7F800000).to(kind, bitcast=True)
        power = tl.maximum(power, 1.1754943508222875e-38)
    return tl.where(reach > 0, power, 1.0)


@triton.jit
def _narrow(values, kind: tl.constexpr, largest: tl.constexpr):
    """Cast, saturating what is finite."""
    if values.dtype != kind:
        finite = tl.abs(values) < float("inf")
        limited = tl.minimum(tl.maximum(values, -largest), largest)
        values = tl.where(finite, limited, values).to(kind)
    return values


@triton.jit
def _hypotenuse(one, other):
    """Return the root of the sum of squares, of which none is formed."""
    large, small = tl.maximum(one, other), tl.minimum(one, other)
    share = tl.where(large > 0, small / tl.where(large > 0, large, 1.0), 0.0)
    return large * tl.sqrt(1.0 + share * share)


@triton.jit
def _scale(layer, moment, unit, scale: tl.constexpr, kind: tl.constexpr):
    """Return constant times f, and the curvature, in units."""
    eps, constant = _number(layer, 16, kind), _number(layer, 17, kind)
    unbiased = _number(layer, 18, kind)
    root = tl.sqrt(moment * unbiased)
    # The root of eps is in the table where the form of f asks for it.
    floor = eps / unit
    if scale == "none":
        divisor, square = 1.0 / unit, root * 0.0
    elif scale == "outside":
        divisor = root + floor
        square = root * divisor
    elif scale == "max":
        divisor = tl.maximum(root, floor)
        square = tl.where(root >= floor, root * root, 0.0)
    else:
        divisor = _hypotenuse(root, floor)
        square = divisor * divisor
    empty = divisor == 0
    factor = tl.where(empty, 0.0, constant / tl.where(empty, 1.0, divisor))
    empty = square == 0
    curvature = tl.where(empty, 0.0, unbiased / tl.where(empty, 1.0, square))
    # Comparisons lose a NaN that the rules want kept.
    spoilt = (moment - moment) != 0
    nan = float("nan")
    return tl.where(spoilt, nan, factor), tl.where(spoilt, nan, curvature)


@triton.jit
def forward_rows(
    table,
    layer_of_row,
    weight_kind: tl.constexpr,
    out_kind: tl.constexpr,
    largest: tl.constexpr,
    gain_kind: tl.constexpr,
    offset_kind: tl.constexpr,
    kind: tl.constexpr,
    centre: tl.constexpr,
    raw: tl.constexpr,
    scale: tl.constexpr,
    one_run: tl.constexpr,
    size: tl.constexpr,
):
    """Compute one effective filter and the numbers kept of it."""
    program = tl.program_id(0)
    layer = table + tl.load(layer_of_row + program) * WIDTH
    row = program - tl.load(layer)
    fan_in, run, run_stride = tl.load(layer + 10), tl.load(layer + 11), tl.load(layer + 12)
    start = _start(layer, row)
    weight = tl.load(layer + 1).to(tl.pointer_type(weight_kind)) + start
    out = tl.load(layer + 2).to(tl.pointer_type(out_kind)) + start
    length = fan_in.to(kind)
    pivot = tl.load(weight).to(kind)
    if raw:
        pivot = pivot * 0.0
    blocks = tl.cdiv(fan_in, size)
    total = tl.zeros([size], dtype=kind)
    reach = tl.zeros([size], dtype=kind)
    for block in range(0, blocks):
        place, inside = _places(block, fan_in, run, run_stride, one_run, size)
        apart = tl.load(weight + place, mask=inside, other=0.0).to(kind) - pivot
        apart = tl.where(inside, apart, 0.0)
        reach = tl.maximum(reach, tl.abs(apart))
        total += apart
    unit = _unit(tl.max(reach, axis=0), kind)
    inverse = _inverse(unit, kind)
    mean = tl.sum(total, axis=0) / length * inverse
    if raw:
        mean = mean * 0.0
    rest = tl.zeros([size], dtype=kind)
    squares = tl.zeros([size], dtype=kind)
    for block in range(0, blocks):
        place, inside = _places(block, fan_in, run, run_stride, one_run, size)
        apart = tl.load(weight + place, mask=inside, other=0.0).to(kind) - pivot
        apart = tl.where(inside, apart * inverse - mean, 0.0)
        rest += apart
        squares += apart * apart
    moment = tl.sum(squares, axis=0) / length
    if not raw:
        # The mean was rounded: what it left behind is taken off as well.
        left = tl.sum(rest, axis=0) / length
        mean += left
        moment = tl.maximum(moment - left * left, moment * 0.0)
    factor, curvature = _scale(layer, moment, unit, scale, kind)
    kept = tl.load(layer + 4).to(tl.pointer_type(kind)) + row * 4
    tl.store(kept, mean)
    tl.store(kept + 1, unit)
    tl.store(kept + 2, factor)
    tl.store(kept + 3, curvature)
    if gain_kind is not None:
        factor *= tl.load(tl.load(layer + 5).to(tl.pointer_type(gain_kind)) + row).to(kind)
    shift = factor * 0.0
    if offset_kind is not None:
        shift = tl.load(tl.load(layer + 6).to(tl.pointer_type(offset_kind)) + row).to(kind)
    for block in range(0, blocks):
        place, inside = _places(block, fan_in, run, run_stride, one_run, size)
        values = tl.load(weight + place, mask=inside, other=0.0).to(kind)
        values = (values - pivot) * inverse - mean if centre else values * inverse
        values = values * factor
        if offset_kind is not None:
            values += shift
        tl.store(out + place, _narrow(values, out_kind, largest), mask=inside)


@triton.jit
def backward_rows(
    table,
    layer_of_row,
    weight_kind: tl.constexpr,
    gradient_kind: tl.constexpr,
    largest: tl.constexpr,
    gain_kind: tl.constexpr,
    offset_kind: tl.constexpr,
    gain_largest: tl.constexpr,
    offset_largest: tl.constexpr,
    kind: tl.constexpr,
    centre: tl.constexpr,
    raw: tl.constexpr,
    one_run: tl.constexpr,
    size: tl.constexpr,
):
    """Compute the gradients of one filter, and of its gain and offset."""
    program = tl.program_id(0)
    layer = table + tl.load(layer_of_row + program) * WIDTH
    row = program - tl.load(layer)
    fan_in, run, run_stride = tl.load(layer + 10), tl.load(layer + 11), tl.load(layer + 12)
    start = _start(layer, row)
    weight = tl.load(layer + 1).to(tl.pointer_type(weight_kind)) + start
    out = tl.load(layer + 2).to(tl.pointer_type(weight_kind)) + start
    gradient = tl.load(layer + 3).to(tl.pointer_type(gradient_kind)) + start
    kept = tl.load(layer + 4).to(tl.pointer_type(kind)) + row * 4
    mean, unit = tl.load(kept), tl.load(kept + 1)
    factor, curvature = tl.load(kept + 2), tl.load(kept + 3)
    inverse = _inverse(unit, kind)
    length = fan_in.to(kind)
    pivot = tl.load(weight).to(kind)
    if raw:
        pivot = pivot * 0.0
    blocks = tl.cdiv(fan_in, size)
    total = tl.zeros([size], dtype=kind)
    inner = tl.zeros([size], dtype=kind)
    for block in range(0, blocks):
        place, inside = _places(block, fan_in, run, run_stride, one_run, size)
        values = tl.load(weight + place, mask=inside, other=0.0).to(kind)
        push = tl.load(gradient + place, mask=inside, other=0.0).to(kind)
        values = (values - pivot) * inverse - mean if centre else values * inverse
        total += push
        inner += tl.where(inside, push * values, 0.0)
    sum_outer, sum_inner = tl.sum(total, axis=0), tl.sum(inner, axis=0)
    if gain_kind is not None:
        to_gain = tl.load(layer + 7).to(tl.pointer_type(gain_kind)) + row
        tl.store(to_gain, _narrow(sum_inner * factor, gain_kind, gain_largest))
        factor *= tl.load(tl.load(layer + 5).to(tl.pointer_type(gain_kind)) + row).to(kind)
    if offset_kind is not None:
        to_offset = tl.load(layer + 8).to(tl.pointer_type(offset_kind)) + row
        tl.store(to_offset, _narrow(sum_outer, offset_kind, offset_largest))
    outer_mean = sum_outer / length
    along = sum_inner * curvature / length
    factor *= inverse
    for block in range(0, blocks):
        place, inside = _places(block, fan_in, run, run_stride, one_run, size)
        values = tl.load(weight + place, mask=inside, other=0.0).to(kind)
        push = tl.load(gradient + place, mask=inside, other=0.0).to(kind)
        values = (values - pivot) * inverse - mean
        if centre:
            push -= outer_mean
        push = (push - values * along) * factor
        tl.store(out + place, _narrow(push, weight_kind, largest), mask=inside)
