"""Moments of activations of a unit normal number, by quadrature at 25 digits (section 5.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mpmath

PUBLIC_GAINS = {
    "identity": 1.0,
    "relu": 1.7139588594436646,
    "gelu": 1.7015043497085571,
    "silu": 1.7881293296813965,
}
"""The constants of published code, sample estimates, to the digits published there."""


@functools.cache
def activation_moments(name: str) -> tuple[float, float, float]:
    """Return mean, variance and 1/sqrt(variance) of an activation of N(0, 1), by quadrature.

    25 digits, with the kinks as end points of the pieces (section 5.3).
    """
    function, kinks = _ACTIVATIONS[name]
    with mpmath.workdps(25):
        ends = [-mpmath.inf, *sorted(kinks), mpmath.inf]
        first = mpmath.quad(lambda z: function(z) * mpmath.npdf(z), ends)
        second = mpmath.quad(lambda z: function(z) ** 2 * mpmath.npdf(z), ends)
        variance = second - first**2
        return float(first), float(variance), float(1 / mpmath.sqrt(variance))


def _leaky(slope: str) -> tuple[Callable[[Any], Any], list[int]]:
    return (lambda z: z if z > 0 else mpmath.mpf(slope) * z), [0]


def _clip(z: Any, low: Any, high: Any) -> Any:
    return max(low, min(high, z))


def _softplus(z: Any) -> Any:
    return mpmath.log1p(mpmath.exp(-abs(z))) + max(z, 0)


_SELU = (
    mpmath.mpf("1.6732632423543772848170429916717"),
    mpmath.mpf("1.0507009873554804934193349852946"),
)

_ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "identity": (lambda z: z, [0]),
    "relu": _leaky("0"),
    "leaky_relu": _leaky("0.01"),
    "leaky_relu_0.2": _leaky("0.2"),
    "prelu": _leaky("0.25"),
    "relu6": (lambda z: _clip(z, 0, 6), [0, 6]),
    "relu_squared": (lambda z: max(z, 0) ** 2, [0]),
    "elu": (lambda z: z if z > 0 else mpmath.expm1(z), [0]),
    "celu": (lambda z: z if z > 0 else mpmath.expm1(z), [0]),
    "selu": (lambda z: _SELU[1] * (z if z > 0 else _SELU[0] * mpmath.expm1(z)), [0]),
    "gelu": (lambda z: z * mpmath.ncdf(z), [0]),
    "gelu_tanh": (
        lambda z: (
            z
            / 2
            * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)))
        ),
        [-3, 0, 3],
    ),
    "silu": (lambda z: z / (1 + mpmath.exp(-z)), [0]),
    "mish": (lambda z: z * mpmath.tanh(_softplus(z)), [-3, 0, 3]),
    "hardswish": (lambda z: z * _clip(z + 3, 0, 6) / 6, [-3, 0, 3]),
    "softplus": (_softplus, [0]),
    "logsigmoid": (lambda z: -_softplus(-z), [0]),
    "sigmoid": (lambda z: 1 / (1 + mpmath.exp(-z)), [0]),
    "hardsigmoid": (lambda z: _clip(z + 3, 0, 6) / 6, [-3, 0, 3]),
    "tanh": (mpmath.tanh, [0]),
    "hardtanh": (lambda z: _clip(z, -1, 1), [-1, 0, 1]),
    "softsign": (lambda z: z / (1 + abs(z)), [0]),
}
