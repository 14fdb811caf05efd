"""Every method's published formula, one filter after the other, independent of filterwise.

Written from the specification (`sections` in the comments), never from the code under test. A
filter is a list of numbers; `m` is the arithmetic: `math` (float64, exact sums by `math.fsum`) or
`mpmath.mp` for values whose squares leave float64's range. In the notation of the laws

    E = gain * k * (W - c * mean(W)) / D(s) [+ offset]

with s the biased standard deviation, or the root mean square where a method divides by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from support.activations import PUBLIC_GAINS, activation_moments

Row = Sequence[Any]

PRESERVING = math.sqrt(2.0 / (1.0 - 1.0 / math.pi))  # 1.7128585504, section 2.3


@dataclass(frozen=True)
class Formula:
    """A published formula for filters of one fan-in."""

    centred: bool
    """c: whether the mean is subtracted."""
    about_mean: bool
    """Whether s is the standard deviation; otherwise the root mean square."""
    constant: float
    """k."""
    divisor: Callable[[Any, Any], Any]
    """D(s, m)."""
    slope: Callable[[Any, Any], Any]
    """D'(s, m)."""

    def rho(self, s: float) -> float:
        """Share of the radial gradient that is kept: 1 - s D'/D (section 7.1)."""
        return 1.0 - s * self.slope(s, math) / self.divisor(s, math)


def _undivided(_s: Any, _m: Any) -> int:
    return 1


def _flat(_s: Any, _m: Any) -> int:
    return 0


def _inside(eps: float, unbiased: float = 1.0) -> tuple[Callable, Callable]:
    """D = sqrt(u^2 s^2 + eps)."""

    def divisor(s: Any, m: Any) -> Any:
        return m.sqrt((unbiased * s) ** 2 + eps)

    def slope(s: Any, m: Any) -> Any:
        below = divisor(s, m)
        return unbiased**2 * s / below if below else 0

    return divisor, slope


def _weight_standardization(n: int, o: Mapping[str, Any]) -> Formula:
    # Section 1.1: Eq. 2; Eqs. 5 and 6 alone for the ablations; the unbiased std is u s.
    unbiased = math.sqrt(n / (n - 1)) if o["ddof"] else 1.0
    if not o["divide"]:
        divisor, slope = _undivided, _flat
    elif o["eps_inside"]:
        divisor, slope = _inside(o["eps"], unbiased)
    else:
        divisor, slope = (lambda s, _m: unbiased * s + o["eps"]), (lambda _s, _m: unbiased)
    return Formula(
        centred=o["centre"],
        about_mean=o["centre"] or o["moment"] == "central",
        constant=n**-0.5 if o["scale"] == "fan_in" else 1.0,
        divisor=divisor,
        slope=slope,
    )


def _weight_align(n: int, o: Mapping[str, Any]) -> Formula:
    # Section 2.1: Eq. 10, g sqrt(2/n) w_dot / sqrt(V + eps); Table IV keeps the central moment.
    root = {"he": math.sqrt(2.0), "preserving": PRESERVING}[o["constant"]]
    divisor, slope = _inside(o["eps"]) if o["divide"] else (_undivided, _flat)
    return Formula(
        centred=o["centre"],
        about_mean=True,
        constant=(root / math.sqrt(n) if o["divide"] else 1.0) / o["factor"],
        divisor=divisor,
        slope=slope,
    )


def gamma_number(gamma: float | str, n: int) -> float:
    """Return gamma of Parametric Weight Standardization as a number (section 3.1)."""
    if not isinstance(gamma, str):
        return gamma
    named = {"large": 1e-3, "medium": 1e-4, "small": 1e-5, "none": 0.0, "relative": 0.1 * 2 / n}
    if gamma in named:
        return named[gamma]
    share, rest = gamma.split("*", 1)
    assert rest == "2/n", gamma
    return float(share) * 2 / n


def _parametric(n: int, o: Mapping[str, Any]) -> Formula:
    # Section 3.1: Eq. 12.
    divisor, slope = _inside(gamma_number(o["gamma"], n))
    return Formula(True, True, math.sqrt(2 / n), divisor, slope)


def _norm(n: int, eps: float, *, centred: bool) -> Formula:
    # Sections 5.1 and 5.2: g v / max(|v|, eps) with |v| = sqrt(n) s.
    def divisor(s: Any, m: Any) -> Any:
        return max(m.sqrt(n) * s, eps)

    def slope(s: Any, m: Any) -> Any:
        return m.sqrt(n) if m.sqrt(n) * s > eps else 0

    return Formula(centred, centred, 1.0, divisor, slope)


def _weight_normalization(n: int, o: Mapping[str, Any]) -> Formula:
    return _norm(n, o["eps"], centred=False)


def _centered_weight_normalization(n: int, o: Mapping[str, Any]) -> Formula:
    return _norm(n, o["eps"], centred=True)


def _weight_centering(_n: int, _o: Mapping[str, Any]) -> Formula:
    return Formula(True, True, 1.0, _undivided, _flat)


def _scaled(n: int, o: Mapping[str, Any]) -> Formula:
    # Section 5.3: the public NFNet form floors n V; timm's adds eps to V.
    unbiased = math.sqrt(n / (n - 1)) if o["ddof"] else 1.0
    gain = o["activation"]
    if isinstance(gain, str):
        gain = PUBLIC_GAINS[gain] if o["public"] else activation_moments(gain)[2]
    if not o["floor"]:
        divisor, slope = _inside(o["eps"], unbiased)
        return Formula(True, True, gain * n**-0.5, divisor, slope)

    def floored(s: Any, m: Any) -> Any:
        return m.sqrt(max(n * (unbiased * s) ** 2, o["eps"]))

    def slope_above(s: Any, m: Any) -> Any:
        return m.sqrt(n) * unbiased if n * (unbiased * s) ** 2 > o["eps"] else 0

    return Formula(True, True, gain, floored, slope_above)


def _equivariant(_n: int, o: Mapping[str, Any]) -> Formula:
    # Section 5.4: Weight Standardization, cell by cell.
    if o["eps_inside"]:
        divisor, slope = _inside(o["eps"])
    else:
        divisor, slope = (lambda s, _m: s + o["eps"]), (lambda _s, _m: 1)
    return Formula(True, True, 1.0, divisor, slope)


FORMULAS: dict[str, Callable[[int, Mapping[str, Any]], Formula]] = {
    "ws": _weight_standardization,
    "wa": _weight_align,
    "pws": _parametric,
    "wn": _weight_normalization,
    "cwn": _centered_weight_normalization,
    "centered": _weight_centering,
    "sws": _scaled,
    "ews": _equivariant,
}
"""Weight-only methods by recipe name; Equilibrium Normalization is in `equilibrium`."""


def formula(method: Any, fan_in: int) -> Formula:
    """Return the published formula of a weight-only method for filters of `fan_in` weights."""
    return FORMULAS[method.name](fan_in, method.all_options())


@dataclass(frozen=True)
class Moments:
    """Exact statistics of one filter."""

    deviation: list[Any]
    """W - mean(W)."""
    s: Any
    """What the formula divides by a function of."""


def moments(row: Row, f: Formula, m: ModuleType = math) -> Moments:
    """Return a filter's deviations and its s, centred twice: a rounded mean costs nothing."""
    n = len(row)
    mean = m.fsum(row) / n
    once = [w - mean for w in row]
    rest = m.fsum(once) / n
    deviation = [d - rest for d in once]
    squares = [d * d for d in (deviation if f.about_mean else row)]
    return Moments(deviation, m.sqrt(m.fsum(squares) / n))


def effective_row(
    row: Row, f: Formula, gain: Any = 1, offset: Any = 0, m: ModuleType = math
) -> list[Any]:
    """Return one effective filter; 0 where the divisor is exactly 0 (section 1.2)."""
    found = moments(row, f, m)
    below = f.divisor(found.s, m)
    factor = gain * f.constant / below if below else 0
    return [factor * d + offset for d in (found.deviation if f.centred else row)]


def gradient_row(
    row: Row, upstream: Row, f: Formula, gain: Any = 1, m: ModuleType = math
) -> tuple[list[Any], Any, Any]:
    """Return dL/dW, dL/dgain and dL/doffset of one filter (section 7.1), as a slow double loop."""
    n = len(row)
    found = moments(row, f, m)
    below = f.divisor(found.s, m)
    total = m.fsum(upstream)
    if not below:
        return [0.0] * n, 0.0, total
    kept = found.deviation if f.centred else list(row)
    direction = found.deviation if f.about_mean else list(row)
    inner = m.fsum([g * d for g, d in zip(upstream, kept, strict=True)])
    curvature = f.slope(found.s, m) / (below * found.s) if found.s else 0
    mean = total / n if f.centred else 0
    factor = gain * f.constant / below
    to_weight = [
        factor * (g - mean - curvature * inner / n * d)
        for g, d in zip(upstream, direction, strict=True)
    ]
    return to_weight, f.constant / below * inner, total


def effective(
    method: Any,
    matrix: Tensor,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    label: Tensor | None = None,
    m: Any = math,
) -> Tensor:
    """Return the effective weight of a filter matrix ``(filters, fan_in)`` in float64.

    Args:
        method: The method, for its name and options.
        matrix: Raw weights as they are stored, any dtype.
        gain: One number per filter; None is 1.
        offset: One number per filter; None is 0.
        label: Labels in the matrix's shape, for a method of cells.
        m: The arithmetic: `math`, or `mpmath.mp` for extreme values.
    """
    rows = _numbers(matrix, m)
    gains, offsets = _per_filter(gain, len(rows), 1), _per_filter(offset, len(rows), 0)
    out = torch.zeros(matrix.shape, dtype=torch.float64)
    for places, row, gain_, offset_ in _cells(method, rows, gains, offsets, label):
        f = formula(method, len(row))
        done = effective_row(row, f, gain_, offset_, m)
        for (i, j), value in zip(places, done, strict=True):
            out[i, j] = float(value)
    return out


def gradient(
    method: Any,
    matrix: Tensor,
    upstream: Tensor,
    gain: Tensor | None = None,
    *,
    label: Tensor | None = None,
    m: Any = math,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dL/dW, dL/dgain and dL/doffset in float64, for dL/dE = `upstream`."""
    rows, out = _numbers(matrix, m), torch.zeros(matrix.shape, dtype=torch.float64)
    pushes = _numbers(upstream, m)
    gains = _per_filter(gain, len(rows), 1)
    to_gain = torch.zeros(len(rows), dtype=torch.float64)
    to_offset = torch.zeros(len(rows), dtype=torch.float64)
    for places, row, gain_, _ in _cells(method, rows, gains, gains, label):
        f = formula(method, len(row))
        push = [pushes[i][j] for i, j in places]
        done, gain_part, offset_part = gradient_row(row, push, f, gain_, m)
        for (i, j), value in zip(places, done, strict=True):
            out[i, j] = _float(value)
        to_gain[places[0][0]] += float(gain_part)
        to_offset[places[0][0]] += float(offset_part)
    return out, to_gain, to_offset


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _numbers(matrix: Tensor, m: Any) -> list[list[Any]]:
    rows = matrix.detach().double().tolist()
    return rows if m is math else [[m.mpf(w) for w in row] for row in rows]


def _per_filter(values: Tensor | None, filters: int, default: float) -> list[float]:
    return [default] * filters if values is None else values.detach().double().flatten().tolist()


def _cells(
    method: Any, rows: list, gains: list, offsets: list, label: Tensor | None
) -> list[tuple[list[tuple[int, int]], list, float, float]]:
    """Return what is standardized together: (places, numbers, gain, offset)."""
    if label is None:
        return [
            ([(i, j) for j in range(len(row))], row, gains[i], offsets[i])
            for i, row in enumerate(rows)
        ]
    members: dict[tuple, list[tuple[int, int]]] = {}
    for i, labels in enumerate(label.tolist()):
        for j, one in enumerate(labels):
            members.setdefault((one,) if method.shared else (i, one), []).append((i, j))
    return [(places, [rows[i][j] for i, j in places], 1, 0) for places in members.values()]
