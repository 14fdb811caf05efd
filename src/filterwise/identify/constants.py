"""Which published factor a number is: timm's gammas, the exact ones, He's root of two."""

from __future__ import annotations

import math
from typing import Any

from filterwise.methods.activation_gain import ACTIVATIONS, PUBLIC_GAINS, activation_gain

__all__ = ["activation_of", "is_known", "same", "written"]

DIGITS = 1e-11


def same(a: float, b: float, relative: float = DIGITS) -> bool:
    """Tell whether two numbers are one, up to the rounding of a few operations."""
    return math.isclose(a, b, rel_tol=relative)


def written(number: float) -> float:
    """Return a number as somebody would have written it, if it is that close to a short one."""
    for digits, limit in ((3, 1e-6), (12, 4e-15)):
        short = float(f"{number:.{digits}g}")
        if number and abs(number / short - 1) < limit:
            return short
    return number


def activation_of(gamma: float) -> dict[str, Any] | None:
    """Return the options of ``sws`` whose activation has this gain; None if none has."""
    if same(gamma, 1.0):
        return {"activation": "identity"}
    for name, constant in PUBLIC_GAINS.items():
        if same(gamma, constant):
            return {"activation": name, "public": True}
    for name in ACTIVATIONS:
        if same(gamma, activation_gain(name)):
            return {"activation": name}
    return None


def is_known(constant: float, shape: tuple[int, int], *, has_gain: bool) -> bool:
    """Tell whether k is one that is published, for this many filters and weights in each.

    That is 1, and with a gain root 2 or a gamma by root n, or 1 by the root of all weights.
    """
    filters, fan_in = shape
    if same(constant, 1.0):
        return True
    length = constant * math.sqrt(fan_in)
    known = (math.sqrt(2.0), filters**-0.5)
    return has_gain and (any(same(length, one) for one in known) or bool(activation_of(length)))
