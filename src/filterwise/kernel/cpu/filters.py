"""What is done to each filter, compiled, and the function that every thread of a call runs.

``share(job)`` takes tasks, equal shares of the weights of all layers, until none is left; `job`
has the block that it reads. The formulas are the eager kernel's, and so are the rules: a filter
with a number that is not finite becomes NaN and no other changes, a divisor of 0 gives 0.
"""

from __future__ import annotations

import math
from typing import Any

from numba import cfunc, njit, types

from filterwise.kernel.cpu.access import fetch_and_add, load_double, load_integer, store_double
from filterwise.kernel.cpu.job import (
    DOUBLE,
    KEPT,
    MAX,
    NONE,
    OUTSIDE,
    SINGLE,
    Column,
    Job,
)
from filterwise.kernel.cpu.loops import (
    PLAIN,
    buffer_combine,
    buffer_reach,
    buffer_scale,
    buffer_shift,
    buffer_squares,
    buffer_sums,
    gather,
    gradient_sums,
    load_number,
    scatter,
    shift_sums,
    store_number,
    write,
    write_gradient,
)

__all__ = ["compile_share"]

SIZES = (4, 2, 2, 8)
"""Bytes of an element by its dtype's code."""


@njit(**PLAIN)
def _scale(layer, moment, unit):
    """Return constant times f, and the curvature h, for a second moment in units."""
    scale, eps = load_integer(layer, Column.SCALE), load_double(layer, Column.EPS)
    constant, unbiased = load_double(layer, Column.CONSTANT), load_double(layer, Column.UNBIASED)
    if not math.isfinite(moment):
        return math.nan, math.nan
    root, floor = math.sqrt(moment * unbiased), math.sqrt(eps) / unit
    divisor, square = root, root * root
    if scale == NONE:
        return constant * unit, 0.0
    if scale == OUTSIDE:
        divisor = root + eps / unit
        square = root * divisor
    elif scale == MAX:
        divisor = max(root, floor)
        square = square if root >= floor else 0.0
    elif eps > 0:
        divisor = math.hypot(root, floor)
        square = divisor * divisor
    factor = constant / divisor if divisor != 0 else 0.0
    return factor, (unbiased / square if square != 0 else 0.0)


@njit(**PLAIN)
def _keep(layer, row, mean, unit, factor, curvature):
    kept = load_integer(layer, Column.KEPT) + row * KEPT * 8
    store_double(kept, 0, mean)
    store_double(kept, 1, unit)
    store_double(kept, 2, factor)
    store_double(kept, 3, curvature)


@njit(**PLAIN)
def _of_filter(layer, row, values, default):
    """Return this filter's number of a gain or an offset."""
    address = load_integer(layer, values)
    if address == 0:
        return default
    kind = Column.GAIN_TYPE if values == Column.GAIN else Column.OFFSET_TYPE
    return load_number(load_integer(layer, kind), address, row)


@njit(**PLAIN)
def _start(layer, row):
    """Return where a filter starts, in elements."""
    per_group = load_integer(layer, Column.PER_GROUP)
    group = row // per_group
    inside = (row - group * per_group) * load_integer(layer, Column.FILTER_STRIDE)
    return group * load_integer(layer, Column.GROUP_STRIDE) + inside


@njit(**PLAIN)
def _forward_single(layer, row):
    length, run = load_integer(layer, Column.FAN_IN), load_integer(layer, Column.RUN)
    stride, runs = load_integer(layer, Column.RUN_STRIDE), length // run
    kind, start = load_integer(layer, Column.OUT_TYPE), _start(layer, row)
    weight = load_integer(layer, Column.WEIGHT) + start * 4
    out = load_integer(layer, Column.OUT) + start * SIZES[kind]
    first = 0.0 if load_integer(layer, Column.RAW) else load_number(SINGLE, weight, 0)
    total, squares = shift_sums(weight, runs, run, stride, first)
    mean = 0.0 if load_integer(layer, Column.RAW) else total / length
    # Rounding can leave it below 0 by a hair; NaN passes.
    moment = squares / length - mean * mean
    moment = 0.0 if moment < 0 else moment
    factor, curvature = _scale(layer, moment, 1.0)
    _keep(layer, row, mean, 1.0, factor, curvature)
    factor *= _of_filter(layer, row, Column.GAIN, 1.0)
    rest = _of_filter(layer, row, Column.OFFSET, 0.0)
    if load_integer(layer, Column.CENTRE):
        rest -= mean * factor
    else:
        first = 0.0
    write(kind, weight, out, runs, run, stride, first, factor, rest)


@njit(**PLAIN)
def _backward_single(layer, row):
    length, run = load_integer(layer, Column.FAN_IN), load_integer(layer, Column.RUN)
    stride, runs = load_integer(layer, Column.RUN_STRIDE), length // run
    kind, start = load_integer(layer, Column.GRADIENT_TYPE), _start(layer, row)
    weight = load_integer(layer, Column.WEIGHT) + start * 4
    out = load_integer(layer, Column.OUT) + start * 4
    gradient = load_integer(layer, Column.GRADIENT) + start * SIZES[kind]
    centre = load_integer(layer, Column.CENTRE)
    first = 0.0 if load_integer(layer, Column.RAW) else load_number(SINGLE, weight, 0)
    kept = load_integer(layer, Column.KEPT) + row * KEPT * 8
    unit = load_double(kept, 1)
    mean, factor, curvature = (
        load_double(kept, 0) * unit,
        load_double(kept, 2),
        load_double(kept, 3),
    )
    total, inner = gradient_sums(kind, weight, gradient, runs, run, stride, first)
    inner = (inner - mean * total if centre else inner + first * total) / unit
    _gradients_of_filter(layer, row, inner * factor, total)
    outer = factor * _of_filter(layer, row, Column.GAIN, 1.0) / unit
    along = -outer * (inner * curvature / length) / unit
    rest = -along * mean - (outer * (total / length) if centre else 0.0)
    write_gradient(kind, weight, gradient, out, runs, run, stride, first, outer, along, rest)


@njit(**PLAIN)
def _gradients_of_filter(layer, row, to_gain, to_offset):
    address = load_integer(layer, Column.TO_GAIN)
    if address != 0:
        store_number(load_integer(layer, Column.GAIN_TYPE), address, row, to_gain)
    address = load_integer(layer, Column.TO_OFFSET)
    if address != 0:
        store_number(load_integer(layer, Column.OFFSET_TYPE), address, row, to_offset)


@njit(**PLAIN)
def _forward_buffered(layer, row, buffer):
    length, run = load_integer(layer, Column.FAN_IN), load_integer(layer, Column.RUN)
    stride, runs = load_integer(layer, Column.RUN_STRIDE), length // run
    kind, start = load_integer(layer, Column.WEIGHT_TYPE), _start(layer, row)
    out_kind = load_integer(layer, Column.OUT_TYPE)
    weight = load_integer(layer, Column.WEIGHT) + start * SIZES[kind]
    out = load_integer(layer, Column.OUT) + start * SIZES[out_kind]
    raw = load_integer(layer, Column.RAW)
    gather(kind, weight, runs, run, stride, buffer)
    first = 0.0 if raw else load_double(buffer, 0)
    reach = buffer_reach(buffer, length, first)
    unit = reach if reach > 0 else 1.0
    buffer_shift(buffer, length, first, unit)
    mean = 0.0 if raw else buffer_sums(buffer, buffer, length, 0.0)[0] / length
    moment = buffer_squares(buffer, length, mean) / length
    factor, curvature = _scale(layer, moment, unit)
    _keep(layer, row, mean, unit, factor, curvature)
    factor *= _of_filter(layer, row, Column.GAIN, 1.0)
    if not load_integer(layer, Column.CENTRE):
        mean = 0.0
        gather(kind, weight, runs, run, stride, buffer)
        buffer_shift(buffer, length, 0.0, unit)
    buffer_scale(buffer, length, mean, factor, _of_filter(layer, row, Column.OFFSET, 0.0))
    scatter(out_kind, buffer, out, runs, run, stride)


@njit(**PLAIN)
def _backward_buffered(layer, row, buffer):
    length, run = load_integer(layer, Column.FAN_IN), load_integer(layer, Column.RUN)
    stride, runs = load_integer(layer, Column.RUN_STRIDE), length // run
    kind, start = load_integer(layer, Column.WEIGHT_TYPE), _start(layer, row)
    above_kind = load_integer(layer, Column.GRADIENT_TYPE)
    weight = load_integer(layer, Column.WEIGHT) + start * SIZES[kind]
    out = load_integer(layer, Column.OUT) + start * SIZES[kind]
    gradient = load_integer(layer, Column.GRADIENT) + start * SIZES[above_kind]
    centre = load_integer(layer, Column.CENTRE)
    kept = load_integer(layer, Column.KEPT) + row * KEPT * 8
    mean, unit = load_double(kept, 0), load_double(kept, 1)
    factor, curvature = load_double(kept, 2), load_double(kept, 3)
    above = buffer + length * 8
    gather(kind, weight, runs, run, stride, buffer)
    gather(above_kind, gradient, runs, run, stride, above)
    first = 0.0 if load_integer(layer, Column.RAW) else load_double(buffer, 0)
    if not centre:
        buffer_shift(buffer, length, 0.0, unit)
        total, inner = buffer_sums(above, buffer, length, 0.0)
        gather(kind, weight, runs, run, stride, buffer)
        buffer_shift(buffer, length, first, unit)
    else:
        buffer_shift(buffer, length, first, unit)
        buffer_scale(buffer, length, mean, 1.0, 0.0)
        total, inner = buffer_sums(above, buffer, length, 0.0)
        mean = 0.0
    _gradients_of_filter(layer, row, inner * factor, total)
    outer = factor * _of_filter(layer, row, Column.GAIN, 1.0) / unit
    outer_mean = total / length if centre else 0.0
    along = inner * curvature / length
    buffer_combine(above, buffer, length, outer_mean, mean, along, outer)
    scatter(kind, above, out, runs, run, stride)


@njit(**PLAIN)
def _is_single(layer, backward):
    """Tell whether the loops that need no buffer serve this layer."""
    other = Column.GRADIENT_TYPE if backward else Column.OUT_TYPE
    return load_integer(layer, Column.WEIGHT_TYPE) == SINGLE and (
        load_integer(layer, other) != DOUBLE
    )


@njit(**PLAIN)
def _run_task(job, begin, end, buffer):
    """Do the filters whose first weight lies between two places in the row of all weights."""
    backward = load_integer(job, Job.BACKWARD)
    for index in range(load_integer(job, Job.LAYERS)):
        layer = job + (Job.LENGTH + index * Column.LENGTH) * 8
        before = load_integer(layer, Column.BEFORE)
        if before >= end:
            break
        length, filters = load_integer(layer, Column.FAN_IN), load_integer(layer, Column.FILTERS)
        if before + length * filters <= begin:
            continue
        single = _is_single(layer, backward)
        low = (max(begin - before, 0) + length - 1) // length
        high = min((end - before + length - 1) // length, filters)
        for row in range(low, high):
            if single and backward:
                _backward_single(layer, row)
            elif single:
                _forward_single(layer, row)
            elif backward:
                _backward_buffered(layer, row, buffer)
            else:
                _forward_buffered(layer, row, buffer)


def compile_share(sources: int, *, cache: bool) -> Any:
    """Compile ``share(job)`` as a C function, or read it from numba's cache.

    Args:
        sources: A fingerprint of this package's files. It is part of the function, and so of its
            key in the cache, which looks at the file of this function alone.
        cache: Whether to use numba's cache on disk.
    """

    @cfunc(types.void(types.int64), cache=cache, error_model="numpy")
    def share(job):
        if sources == 0:
            return
        buffer = load_integer(job, Job.BUFFERS)
        if buffer != 0:
            taken = fetch_and_add(job, Job.BUFFERS_TAKEN)
            buffer += taken * load_integer(job, Job.BUFFER_LENGTH) * 8
        tasks, weights = load_integer(job, Job.TASKS), load_integer(job, Job.WEIGHTS)
        while True:
            task = fetch_and_add(job, Job.TASK)
            if task >= tasks:
                break
            begin, end = weights * task // tasks, weights * (task + 1) // tasks
            _run_task(job, begin, end, buffer)

    return share
