"""Checks of option values; every message names the field, the demand and what was given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["choice", "flag", "number"]


def number(
    name: str,
    value: object,
    *,
    minimum: float = 0.0,
    above: bool = False,
    maximum: float = math.inf,
) -> float:
    """Return a finite number within its limits as a float.

    Raises:
        ValueError: If it is anything else, booleans included; `above` excludes the minimum.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        enough = value > minimum if above else value >= minimum
        if enough and value <= maximum:
            return float(value)
    demand = "" if minimum == -math.inf else f" {'>' if above else '>='} {minimum:g}"
    limit = "" if maximum == math.inf else f" and <= {maximum:g}"
    raise ValueError(f"{name} must be a number{demand}{limit}, got {value!r}")


def flag(name: str, value: object) -> None:
    """Refuse anything but True and False.

    Raises:
        ValueError: If the value is not a boolean.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not one of those allowed (1 and True are two values).

    Raises:
        ValueError: If the value is not among them.
    """
    if not any(type(value) is type(one) and value == one for one in allowed):
        words = ", ".join(str(one) for one in allowed)
        raise ValueError(f"{name} must be one of {words}, got {value!r}")
