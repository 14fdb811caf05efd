"""Reading and writing memory by address in compiled code, in four floating dtypes.

numba's own arrays would check and wrap every index, which keeps the loops from being vectorized,
and it has no bfloat16. The half-precision conversions are written with 32-bit integers, so that
they vectorize everywhere and need no library function that a platform may lack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "fetch_and_add",
    "load_bfloat16",
    "load_double",
    "load_half",
    "load_integer",
    "load_single",
    "store_bfloat16",
    "store_double",
    "store_half",
    "store_single",
]

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()
BYTES = {I16: 2, F32: 4, I64: 8, F64: 8}

SIGN, MAGNITUDE = 0x80000000, 0x7FFFFFFF
INFINITE = 0x7F800000
"""Bits of float32's infinity; NaN lies above."""


def _same(builder: Any, value: Any) -> Any:
    del builder
    return value


def _loader(kind: Any, result: Any, widen: Callable[[Any, Any], Any] = _same) -> Any:
    """Return ``load(address, index)`` for elements of one kind."""

    @intrinsic
    def load(typing: Any, address: Any, index: Any) -> Any:
        del typing, address, index

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del context, signature
            start = builder.inttoptr(args[0], kind.as_pointer())
            place = builder.gep(start, [args[1]], inbounds=True)
            return widen(builder, builder.load(place, align=BYTES[kind]))

        return result(types.int64, types.int64), generate

    return load


def _storer(kind: Any, argument: Any, narrow: Callable[[Any, Any], Any] = _same) -> Any:
    """Return ``store(address, index, value)`` for elements of one kind."""

    @intrinsic
    def store(typing: Any, address: Any, index: Any, value: Any) -> Any:
        del typing, address, index, value

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del signature
            start = builder.inttoptr(args[0], kind.as_pointer())
            place = builder.gep(start, [args[1]], inbounds=True)
            builder.store(narrow(builder, args[2]), place, align=BYTES[kind])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, argument), generate

    return store


def _bits(builder: Any, value: Any) -> tuple[Any, Any, Any]:
    """Return a float32's bits: the sign, the magnitude, and whether it is NaN."""
    bits = builder.bitcast(value, I32)
    magnitude = builder.and_(bits, I32(MAGNITUDE))
    nan = builder.icmp_unsigned(">", magnitude, I32(INFINITE))
    return builder.and_(bits, I32(SIGN)), magnitude, nan


def _round_to_even(builder: Any, magnitude: Any, digits: int) -> Any:
    """Round the lowest binary digits away, ties to even; a carry moves the exponent, rightly."""
    odd = builder.and_(builder.lshr(magnitude, I32(digits)), I32(1))
    half = I32((1 << (digits - 1)) - 1)
    return builder.lshr(builder.add(builder.add(magnitude, half), odd), I32(digits))


def _finish(
    builder: Any, parts: tuple[Any, Any, Any], rounded: Any, infinity: int, quiet: int
) -> Any:
    """Saturate what is finite, keep infinity and NaN, and put the sign on: 16 bits."""
    sign, magnitude, nan = parts
    over = builder.icmp_unsigned(">=", rounded, I32(infinity))
    finite = builder.icmp_unsigned("<", magnitude, I32(INFINITE))
    rounded = builder.select(
        over, builder.select(finite, I32(infinity - 1), I32(infinity)), rounded
    )
    rounded = builder.select(nan, I32(quiet), rounded)
    return builder.trunc(builder.or_(rounded, builder.lshr(sign, I32(16))), I16)


def _to_bfloat16(builder: Any, value: Any) -> Any:
    parts = _bits(builder, value)
    return _finish(builder, parts, _round_to_even(builder, parts[1], 16), 0x7F80, 0x7FC0)


def _to_half(builder: Any, value: Any) -> Any:
    parts = _bits(builder, value)
    magnitude = parts[1]
    # Rebasing the exponent from 127 to 15 is a subtraction on the bits. Below 2^-14 adding a half
    # lets the addition itself round at the place of the subnormals' last digit.
    rebased = _round_to_even(builder, builder.sub(magnitude, I32(112 << 23)), 13)
    half = ir.Constant(F32, 0.5)
    small = builder.bitcast(builder.fadd(builder.bitcast(magnitude, F32), half), I32)
    small = builder.sub(small, I32(0x3F000000))
    subnormal = builder.icmp_unsigned("<", magnitude, I32(113 << 23))
    return _finish(builder, parts, builder.select(subnormal, small, rebased), 0x7C00, 0x7E00)


def _from_bfloat16(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(value, I32), I32(16)), F32)


def _from_half(builder: Any, value: Any) -> Any:
    bits = builder.zext(value, I32)
    shifted = builder.shl(builder.and_(bits, I32(0x7FFF)), I32(13))
    rebase = ir.Constant(F32, 2.0**112)
    number = builder.bitcast(builder.fmul(builder.bitcast(shifted, F32), rebase), I32)
    special = builder.icmp_unsigned(">=", shifted, I32(0x7C00 << 13))
    number = builder.select(special, builder.or_(shifted, I32(INFINITE)), number)
    sign = builder.shl(builder.and_(bits, I32(0x8000)), I32(16))
    return builder.bitcast(builder.or_(number, sign), F32)


@intrinsic
def _fetch_and_add(typing: Any, address: Any, index: Any) -> Any:
    del typing, address, index

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        start = builder.inttoptr(args[0], I64.as_pointer())
        place = builder.gep(start, [args[1]], inbounds=True)
        return builder.atomic_rmw("add", place, I64(1), "monotonic")

    return types.int64(types.int64, types.int64), generate


fetch_and_add: Any = _fetch_and_add
"""``fetch_and_add(address, index)``: add one to an integer that threads share; what it was."""
load_integer = _loader(I64, types.int64)
load_double = _loader(F64, types.float64)
load_single = _loader(F32, types.float32)
load_bfloat16 = _loader(I16, types.float32, _from_bfloat16)
load_half = _loader(I16, types.float32, _from_half)
store_double = _storer(F64, types.float64)
store_single = _storer(F32, types.float32)
store_bfloat16 = _storer(I16, types.float32, _to_bfloat16)
store_half = _storer(I16, types.float32, _to_half)
