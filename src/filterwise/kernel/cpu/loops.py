"""Loops over one filter, compiled: the family kernel's passes over memory.

A filter lies in `runs` runs of `run` weights each, `stride` weights apart; nearly always it is one
run. Single-precision filters are summed in float64, shifted by their first weight: float64 holds
the square of every float32, and twice its digits, so that one pass is sound where the textbook's is
not. Other dtypes are gathered into a float64 buffer and scattered from it.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32, float64, njit

from filterwise.kernel.cpu.access import (
    load_bfloat16,
    load_double,
    load_half,
    load_single,
    store_bfloat16,
    store_double,
    store_half,
    store_single,
)
from filterwise.kernel.cpu.job import BFLOAT16, DOUBLE, HALF, SINGLE

# Nobody calls these functions from Python or C, so numba need not wrap them: a fifth of the time.
PLAIN: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
# Sums may be taken in any order, but NaN and infinity must behave: no "nnan", no "ninf". Where a
# difference is formed nothing may be reordered, or the shift by the first weight would be undone.
SUMS = {"fastmath": {"reassoc", "contract", "nsz"}, **PLAIN}
EXACT = {"fastmath": {"contract"}, **PLAIN}

FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127


def _writer(store: Any) -> Any:
    @njit(**EXACT)
    def write(weight, out, size, runs, run, stride, first, factor, rest):
        """Write (w - first) factor + rest."""
        for r in range(runs):
            source, target = weight + r * stride * 4, out + r * stride * size
            for i in range(run):
                shifted = float64(load_single(source, i)) - first
                store(target, i, float32(shifted * factor + rest))

    return write


def _gradient_sums(load: Any) -> Any:
    @njit(**SUMS)
    def sums(weight, gradient, size, runs, run, stride, first):
        """Return the sums of g and of g (w - first)."""
        total, inner = 0.0, 0.0
        for r in range(runs):
            source, above = weight + r * stride * 4, gradient + r * stride * size
            for i in range(run):
                shifted = float64(load_single(source, i)) - first
                push = float64(load(above, i))
                total += push
                inner += push * shifted
        return total, inner

    return sums


def _gradient_writer(load: Any) -> Any:
    @njit(**EXACT)
    def write(weight, gradient, size, out, runs, run, stride, first, outer, along, rest):
        """Write g outer + (w - first) along + rest."""
        for r in range(runs):
            source, above = weight + r * stride * 4, gradient + r * stride * size
            target = out + r * stride * 4
            for i in range(run):
                shifted = float64(load_single(source, i)) - first
                push = float64(load(above, i))
                store_single(target, i, float32(push * outer + (shifted * along + rest)))

    return write


def _gatherer(load: Any) -> Any:
    @njit(**PLAIN)
    def gather(source, size, runs, run, stride, buffer):
        for r in range(runs):
            for i in range(run):
                store_double(buffer, r * run + i, float64(load(source + r * stride * size, i)))

    return gather


def _scatterer(store: Any) -> Any:
    @njit(**PLAIN)
    def scatter(buffer, target, size, runs, run, stride):
        for r in range(runs):
            for i in range(run):
                value = load_double(buffer, r * run + i)
                if abs(value) > FLOAT32_MAX and not math.isinf(value):
                    value = math.copysign(FLOAT32_MAX, value)
                store(target + r * stride * size, i, float32(value))

    return scatter


_write_single, _write_bfloat16, _write_half = map(
    _writer, (store_single, store_bfloat16, store_half)
)
_sums_single, _sums_bfloat16, _sums_half = map(
    _gradient_sums, (load_single, load_bfloat16, load_half)
)
_back_single, _back_bfloat16, _back_half = map(
    _gradient_writer, (load_single, load_bfloat16, load_half)
)
_gather_single, _gather_bfloat16, _gather_half, _gather_double = map(
    _gatherer, (load_single, load_bfloat16, load_half, load_double)
)
_scatter_single, _scatter_bfloat16, _scatter_half = map(
    _scatterer, (store_single, store_bfloat16, store_half)
)


# In the functions below `kind` is a dtype's code, `first` what the filter is shifted by.


@njit(**SUMS)
def shift_sums(weight, runs, run, stride, first):
    """Return the sums of w - first and of its squares."""
    total, squares = 0.0, 0.0
    for r in range(runs):
        source = weight + r * stride * 4
        for i in range(run):
            shifted = float64(load_single(source, i)) - first
            total += shifted
            squares += shifted * shifted
    return total, squares


@njit(**PLAIN)
def write(kind, weight, out, runs, run, stride, first, factor, rest):
    """Write (w - first) factor + rest."""
    if kind == SINGLE:
        _write_single(weight, out, 4, runs, run, stride, first, factor, rest)
    elif kind == BFLOAT16:
        _write_bfloat16(weight, out, 2, runs, run, stride, first, factor, rest)
    else:
        _write_half(weight, out, 2, runs, run, stride, first, factor, rest)


@njit(**PLAIN)
def gradient_sums(kind, weight, gradient, runs, run, stride, first):
    """Return the sums of g and of g (w - first)."""
    if kind == SINGLE:
        return _sums_single(weight, gradient, 4, runs, run, stride, first)
    if kind == BFLOAT16:
        return _sums_bfloat16(weight, gradient, 2, runs, run, stride, first)
    return _sums_half(weight, gradient, 2, runs, run, stride, first)


@njit(**EXACT)
def _write_over(weight, gradient, runs, run, stride, first, outer, along, rest):
    # One name for what is read and written: of two the loop would fear that they overlap.
    for r in range(runs):
        source, target = weight + r * stride * 4, gradient + r * stride * 4
        for i in range(run):
            shifted = float64(load_single(source, i)) - first
            push = float64(load_single(target, i))
            store_single(target, i, float32(push * outer + (shifted * along + rest)))


@njit(**PLAIN)
def write_gradient(kind, weight, gradient, out, runs, run, stride, first, outer, along, rest):
    """Write g outer + (w - first) along + rest."""
    if out == gradient:
        _write_over(weight, gradient, runs, run, stride, first, outer, along, rest)
    elif kind == SINGLE:
        _back_single(weight, gradient, 4, out, runs, run, stride, first, outer, along, rest)
    elif kind == BFLOAT16:
        _back_bfloat16(weight, gradient, 2, out, runs, run, stride, first, outer, along, rest)
    else:
        _back_half(weight, gradient, 2, out, runs, run, stride, first, outer, along, rest)


@njit(**PLAIN)
def gather(kind, source, runs, run, stride, buffer):
    """Copy a filter into a float64 buffer."""
    if kind == SINGLE:
        _gather_single(source, 4, runs, run, stride, buffer)
    elif kind == BFLOAT16:
        _gather_bfloat16(source, 2, runs, run, stride, buffer)
    elif kind == HALF:
        _gather_half(source, 2, runs, run, stride, buffer)
    else:
        _gather_double(source, 8, runs, run, stride, buffer)


@njit(**PLAIN)
def scatter(kind, buffer, target, runs, run, stride):
    """Copy a float64 buffer into a filter, saturating what is finite."""
    if kind == SINGLE:
        _scatter_single(buffer, target, 4, runs, run, stride)
    elif kind == BFLOAT16:
        _scatter_bfloat16(buffer, target, 2, runs, run, stride)
    elif kind == HALF:
        _scatter_half(buffer, target, 2, runs, run, stride)
    else:
        for r in range(runs):
            for i in range(run):
                value = load_double(buffer, r * run + i)
                store_double(target + r * stride * 8, i, value)


@njit(**PLAIN)
def load_number(kind, address, index):
    """Return one number of any dtype."""
    if kind == SINGLE:
        return float64(load_single(address, index))
    if kind == BFLOAT16:
        return float64(load_bfloat16(address, index))
    if kind == HALF:
        return float64(load_half(address, index))
    return load_double(address, index)


@njit(**PLAIN)
def store_number(kind, address, index, value):
    """Store one number of any dtype, saturating it if it is finite."""
    if kind == DOUBLE:
        store_double(address, index, value)
        return
    if abs(value) > FLOAT32_MAX and not math.isinf(value):
        value = math.copysign(FLOAT32_MAX, value)
    if kind == SINGLE:
        store_single(address, index, float32(value))
    elif kind == BFLOAT16:
        store_bfloat16(address, index, float32(value))
    else:
        store_half(address, index, float32(value))


@njit(**PLAIN)
def buffer_reach(buffer, length, first):
    """Return the largest distance from `first`; NaN does not count."""
    reach = 0.0
    for i in range(length):
        reach = max(reach, abs(load_double(buffer, i) - first))
    return reach


@njit(**PLAIN)
def buffer_shift(buffer, length, first, unit):
    """Replace every number x by (x - first) / unit."""
    for i in range(length):
        store_double(buffer, i, (load_double(buffer, i) - first) / unit)


@njit(**SUMS)
def buffer_sums(one, other, length, centre):
    """Return the sums of x, and of y (x - centre), over a buffer x and another, y."""
    total, inner = 0.0, 0.0
    for i in range(length):
        value = load_double(one, i)
        total += value
        inner += load_double(other, i) * (value - centre)
    return total, inner


@njit(**SUMS)
def buffer_squares(buffer, length, mean):
    """Return the sum of the squares of x - mean."""
    squares = 0.0
    for i in range(length):
        apart = load_double(buffer, i) - mean
        squares += apart * apart
    return squares


@njit(**EXACT)
def buffer_scale(buffer, length, mean, factor, rest):
    """Replace every number x by (x - mean) factor + rest."""
    for i in range(length):
        store_double(buffer, i, (load_double(buffer, i) - mean) * factor + rest)


@njit(**EXACT)
def buffer_combine(gradient, weight, length, outer_mean, mean, along, factor):
    """Replace every g by (g - outer_mean - along (x - mean)) factor."""
    for i in range(length):
        push = load_double(gradient, i) - outer_mean
        push -= along * (load_double(weight, i) - mean)
        store_double(gradient, i, push * factor)
