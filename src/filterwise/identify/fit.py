r"""Finding a formula from numbers: what a layer makes of filters of many sizes.

A filter of deviation c comes out as :math:`g\,k\,c/D(v)`, with v its variance (mean square, if it
is not centred). At a large v every D is sqrt(v), which gives k; at a tiny one D is eps or its root;
and where the two are alike the forms part:

========= ======================= ==============================
form      D(v)                    at sqrt(v) = D(0)
========= ======================= ==============================
root      sqrt(v + eps)           1.41 D(0)
outside   sqrt(v) + eps           2 D(0)
max       sqrt(max(v, eps))       1 D(0)
none      1                       no D(0)
inverted  1 / sqrt(v + eps)
variance  v + eps
========= ======================= ==============================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from filterwise.identify.constants import is_known, written
from filterwise.identify.probe import Bench, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.filters import FilterLayout

__all__ = ["Fit", "Form", "eps_in_single", "fit"]

Form = Literal["root", "outside", "max", "none", "inverted", "variance"]

LARGE, TINY = 1e9, 1e-15
CLOSE = 1e-7


@dataclass(frozen=True)
class Fit:
    """What was found: ``W_hat = g k c / D(v)``, plus an offset.

    Attributes:
        layout: Where the filters lie.
        centred: Whether c is W - mean(W), or W.
        form: The form of D.
        eps: The number in D, in the unit of v (of its root for "outside"), as `unbiased` counts v.
        constant: k, by the v that `unbiased` names.
        unbiased: Whether v divides by n - 1.
        filters: How many filters there are.
        fan_in: n.
    """

    layout: FilterLayout
    centred: bool
    form: Form
    eps: float
    constant: float
    unbiased: bool
    filters: int
    fan_in: int


class _Rows(NamedTuple):
    """Filters that were probed: their factor c -> W_hat, and their moment."""

    factor: Tensor
    moment: Tensor


def _rows(bench: Bench, size: float, *, centred: bool, close: float = CLOSE) -> _Rows | None:
    """Return factor and moment of each filter; None if it does not come out as c times a number."""
    offset = bench.offset if size == LARGE else None  # beside it a small filter would be rounding
    found = bench.effective(bench.unit * size, offset)
    if found is None:
        return None
    matrix, hat = bench.layout.matrix(bench.unit * size), bench.layout.matrix(found.double())
    if offset is not None:
        hat = hat - offset[:, None]
    if centred:
        matrix = matrix - matrix.mean(1, keepdim=True)
    square = matrix.square()
    factor = (hat * matrix).sum(1) / square.sum(1)
    rest = (hat - factor[:, None] * matrix).norm(dim=1)
    if not bool((rest <= close * hat.norm(dim=1)).all()):
        return None
    return _Rows(factor if bench.gain is None else factor / bench.gain, square.mean(1))


def _common(values: Tensor) -> float | None:
    """Return the number that all values are, or None."""
    middle = float(values.median())
    if middle == 0 or not math.isfinite(middle):
        return None
    return middle if bool(((values / middle - 1).abs() < CLOSE).all()) else None


def fit(probe: Probe, layouts: Sequence[FilterLayout]) -> Fit | None:
    """Find the formula of a layer; None if it is none of these forms."""
    for layout in layouts:
        bench = Bench(probe, layout)
        for centred in (True, False) if bench.fits else ():
            # Two sizes: of one filter alone every number would be common to all.
            two = [_rows(bench, size, centred=centred) for size in (LARGE, LARGE / 8)]
            if two[0] is None or two[1] is None:
                continue
            large = _Rows(*(torch.cat(pair) for pair in zip(*two, strict=True)))  # pyright: ignore[reportArgumentType]
            if (found := _fitted(bench, large, centred=centred)) is not None:
                return found
    return None


def _fitted(bench: Bench, large: _Rows, *, centred: bool) -> Fit | None:
    root, tiny = large.moment.sqrt(), _rows(bench, TINY, centred=centred)
    place, shape = (bench.layout, centred), (bench.filters, bench.fan_in)
    if tiny is None:
        return None
    if (constant := _common(torch.cat([large.factor, tiny.factor]))) is not None:
        return Fit(*place, "none", 0.0, constant, False, *shape)
    if (constant := _common(large.factor * root)) is not None:
        return _divided(bench, constant, tiny, centred=centred)
    if (constant := _common(large.factor / root)) is not None:
        eps = float((tiny.factor / constant).square().median() - tiny.moment.median())
        return Fit(*place, "inverted", written(eps), constant, False, *shape)
    if (constant := _common(large.factor * large.moment)) is not None:
        eps = float((constant / tiny.factor).median() - tiny.moment.median())
        return Fit(*place, "variance", written(eps), constant, False, *shape)
    return None


def _divided(bench: Bench, constant: float, tiny: _Rows, *, centred: bool) -> Fit | None:
    n = bench.fan_in
    shape = (bench.filters, n)
    unbiased = centred and _is_unbiased(constant, shape, has_gain=bench.gain is not None)
    more = n / (n - 1) if unbiased else 1.0
    constant *= math.sqrt(more)
    divisor, root = constant / tiny.factor, (tiny.moment * more).sqrt()
    if bool(((divisor / root - 1).abs() < CLOSE).all()):
        return Fit(bench.layout, centred, "root", 0.0, constant, unbiased, *shape)
    least = float(divisor.median())
    if not 0 < least < LARGE:
        return None
    middle = _rows(bench, least, centred=centred)
    if middle is None:
        return None
    divisor, moment = constant / middle.factor, middle.moment * more
    forms: dict[Form, tuple[float, Tensor]] = {
        "root": (least**2, (moment + least**2).sqrt()),
        "outside": (least, moment.sqrt() + least),
        "max": (least**2, moment.clamp_min(least**2).sqrt()),
    }
    for form, (eps, expected) in forms.items():
        if bool(((divisor / expected - 1).abs() < CLOSE).all()):
            return Fit(bench.layout, centred, form, written(eps), constant, unbiased, *shape)
    return None


def _is_unbiased(constant: float, shape: tuple[int, int], *, has_gain: bool) -> bool:
    """Tell by k whether the variance was divided by n - 1: only then is it one that is known."""
    other = constant * math.sqrt(shape[1] / (shape[1] - 1))
    known = is_known(constant, shape, has_gain=has_gain)
    return not known and is_known(other, shape, has_gain=has_gain)


def eps_in_single(probe: Probe, found: Fit) -> float:
    """Return the eps of a layer that is known from float64 when it runs in float32.

    Some copies take another one for each dtype of the input.
    """
    bench = Bench(probe, found.layout)
    tiny = _rows(bench, TINY, centred=found.centred, close=1e-3)
    if tiny is None or not found.eps or found.form not in ("root", "outside", "max"):
        return found.eps
    least = float((found.constant / tiny.factor).median())
    eps = least if found.form == "outside" else least**2
    return found.eps if abs(eps / found.eps - 1) < 1e-2 else float(f"{eps:.2g}")
