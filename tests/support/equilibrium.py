"""Equilibrium Normalization as specified (section 4), one filter after the other.

A filter is a list of numbers over (channel, tap); `v` has the mean of the input channel that each
of them sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def spread(values: Tensor, weight: Tensor) -> Tensor:
    """Return v for every weight, ``(filters, fan_in)``: row d sees the channels of its group."""
    filters, channels = weight.shape[:2]
    taps = weight[0, 0].numel()
    groups = values.numel() // channels
    rows = []
    for d in range(filters):
        q = d // (filters // groups)
        rows.append(values[q * channels : (q + 1) * channels].double().repeat_interleave(taps))
    return torch.stack(rows)


def effective_row(
    row: Sequence[float], v: Sequence[float], *, single_pass: bool = False, phi: float = 1.0
) -> list[float]:
    """Return one effective filter (section 4.1, 4.2; degenerate filters as section 4.4 rules)."""
    balanced, divisor, _ = _parts(row, v, single_pass=single_pass)
    return [phi * w / divisor if divisor else 0.0 for w in balanced]


def _parts(
    row: Sequence[float], v: Sequence[float], *, single_pass: bool
) -> tuple[list[float], float, list[bool]]:
    total = math.fsum(v)
    if total:
        shift = -math.fsum([a * b for a, b in zip(v, row, strict=True)]) / total
    else:
        shift = -math.fsum(row) / len(row)
    balanced = [w + shift for w in row]
    if total:  # once more: the shift of a filter with a large mean is rounded
        rest = math.fsum([a * w for a, w in zip(v, balanced, strict=True)]) / total
        balanced = [w - rest for w in balanced]
    one_sign = all(w > 0 for w in row) or all(w <= 0 for w in row)
    counted = row if single_pass and not one_sign else balanced
    positive = [w > 0 for w in counted]
    terms = zip(v, balanced, positive, strict=True)
    return balanced, math.fsum([a * w for a, w, on in terms if on]), positive


def gradient_row(
    row: Sequence[float],
    v: Sequence[float],
    upstream: Sequence[float],
    *,
    single_pass: bool = False,
    phi: float = 1.0,
) -> tuple[list[float], list[float]]:
    """Return dL/dw and dL/dv per weight of one filter (section 4.4)."""
    _, divisor, positive = _parts(row, v, single_pass=single_pass)
    if not divisor:
        return [0.0] * len(row), [0.0] * len(row)
    out = effective_row(row, v, single_pass=single_pass, phi=phi)
    total = math.fsum(v)
    inner = math.fsum([g * w for g, w in zip(upstream, out, strict=True)])
    first = [
        phi / divisor * g - inner / divisor * a * on
        for g, a, on in zip(upstream, v, positive, strict=True)
    ]
    mean = math.fsum(first) / total
    to_weight = [g - a * mean for g, a in zip(first, v, strict=True)]
    pushed, share = (
        math.fsum(upstream),
        math.fsum([a for a, on in zip(v, positive, strict=True) if on]),
    )
    to_mean = [
        -w / total * pushed - inner / phi * w * (on - share / total)
        for w, on in zip(out, positive, strict=True)
    ]
    return to_weight, to_mean


def effective(
    weight: Tensor,
    values: Tensor,
    gain: Tensor | None = None,
    *,
    single_pass: bool = False,
    phi: float = 1.0,
) -> Tensor:
    """Return the effective weight ``(O, C/g, taps...)`` in float64 for input means ``(C,)``."""
    v = spread(values, weight)
    rows = weight.detach().double().flatten(1).tolist()
    done = [
        effective_row(row, means, single_pass=single_pass, phi=phi)
        for row, means in zip(rows, v.tolist(), strict=True)
    ]
    out = torch.tensor(done, dtype=torch.float64)
    if gain is not None:
        out = out * gain.detach().double().reshape(-1, 1)
    return out.view(weight.shape)


def gradient(
    weight: Tensor, values: Tensor, upstream: Tensor, *, single_pass: bool = False, phi: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return dL/dw in the weight's shape and dL/dv ``(C,)``, in float64."""
    v = spread(values, weight)
    filters, channels = weight.shape[:2]
    groups = values.numel() // channels
    to_weight = torch.zeros(filters, v.shape[1], dtype=torch.float64)
    to_mean = torch.zeros(values.numel(), dtype=torch.float64)
    rows = weight.detach().double().flatten(1).tolist()
    pushes = upstream.double().flatten(1).tolist()
    for d, (row, push) in enumerate(zip(rows, pushes, strict=True)):
        to_row, to_v = gradient_row(row, v[d].tolist(), push, single_pass=single_pass, phi=phi)
        to_weight[d] = torch.tensor(to_row, dtype=torch.float64)
        q = d // (filters // groups)
        part = torch.tensor(to_v, dtype=torch.float64).view(channels, -1).sum(1)
        to_mean[q * channels : (q + 1) * channels] += part
    return to_weight.view(weight.shape), to_mean
