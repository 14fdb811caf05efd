"""Signals written out with Python's own floats, one number after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def rows_of(module, weight) -> list[list[float]]:
    """Return the weights that feed each output channel, by the definition of the layer."""
    weight = weight.detach().double()
    if not type(module).__mro__ or "Transpose" not in "".join(
        c.__name__ for c in type(module).__mro__
    ):
        return [weight[o].flatten().tolist() for o in range(weight.shape[0])]
    groups, per_group = module.groups, weight.shape[1]
    inputs = weight.shape[0] // groups
    return [
        [
            value
            for channel in range(group * inputs, (group + 1) * inputs)
            for value in weight[channel, place].flatten().tolist()
        ]
        for group in range(groups)
        for place in range(per_group)
    ]


def mean(row: Row) -> float:
    return math.fsum(row) / len(row)


def variance(row: Row) -> float:
    centre = mean(row)
    return math.fsum((value - centre) ** 2 for value in row) / len(row)


def norm(row: Row) -> float:
    return math.sqrt(math.fsum(value**2 for value in row))


def dot(one: Row, other: Row) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def centred(row: Row) -> list[float]:
    centre = mean(row)
    return [value - centre for value in row]


def positive(row: Row) -> float:
    return sum(value > 0 for value in row) / len(row)


def sign_distance(row: Row) -> float:
    above = math.fsum(value**2 for value in row if value > 0)
    below = math.fsum(value**2 for value in row if value < 0)
    return math.sqrt(min(above, below) / (above + below))


def turn(before: Row, after: Row) -> float:
    return math.acos(max(-1.0, min(1.0, dot(before, after) / norm(before) / norm(after))))


def radial(gradient: Row, weight: Row) -> float:
    return dot(gradient, weight) / norm(weight)


def tangential(gradient: Row, weight: Row) -> float:
    along = radial(gradient, weight)
    length = norm(weight)
    return norm([g - along * w / length for g, w in zip(gradient, weight, strict=True)])


def three_shares(gradient: Row, weight: Row) -> tuple[float, float, float]:
    """Kept, radial and mean, by Gram-Schmidt."""
    n = len(weight)
    direction = centred(weight)
    length = norm(direction)
    unit = [value / length for value in direction]
    along = dot(gradient, unit)
    average = math.fsum(gradient) / math.sqrt(n)
    rest = [g - along * u - average / math.sqrt(n) for g, u in zip(gradient, unit, strict=True)]
    whole = dot(gradient, gradient)
    return dot(rest, rest) / whole, along**2 / whole, average**2 / whole


def shift(gradients: Sequence[Row], lr: float) -> float:
    return variance([math.fsum(lr * g for g in row) for row in gradients])


def variance_ratio(weight: Row, gradient: Row, lr: float) -> float:
    moved = [w - lr * g for w, g in zip(weight, gradient, strict=True)]
    return variance(moved) / variance(weight)


def count_between(values: Row, low: float, high: float, bins: int = 64) -> list[int]:
    counts = [0] * bins
    for value in values:
        place = math.floor((value - low) / ((high - low) / bins))
        counts[max(0, min(bins - 1, place))] += 1
    return counts
