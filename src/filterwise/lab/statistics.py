"""Medians, quartiles and intervals over seeds: what several runs of one setting say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Interval", "Quartiles", "Statistic", "from_value", "paired", "quartiles", "statistic"]

Statistic = Literal["median", "iqr"]
"""Of values over seeds: their median, or the distance of their quartiles."""

RESAMPLES = 2000
LEVEL = (2.5, 97.5)
ROUNDING = 1e-9


class Quartiles(NamedTuple):
    """Of some values: first quartile, median, third quartile; interpolated linearly."""

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class Interval:
    """A difference and the 95 % interval of its bootstrap.

    Attributes:
        value: The difference of the medians, in the unit of the values.
        low: Lower end; None where a single run leaves nothing to draw from.
        high: Upper end.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def seen(self) -> bool:
        """Whether the interval leaves zero out, by more than what rounding does."""
        if self.low is None or self.high is None:
            return False
        least = ROUNDING * max(abs(self.low), abs(self.high))
        return self.low > least or self.high < -least


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of at least one value."""
    lower, median, upper = numpy.percentile(values, (25, 50, 75))
    return Quartiles(float(lower), float(median), float(upper))


def statistic(values: Sequence[float], which: Statistic = "median") -> float:
    """Return one number that stands for some values."""
    return float(_over(numpy.asarray(values, dtype=float), which))


def from_value(values: Sequence[float], fixed: float, which: Statistic = "median") -> Interval:
    """Return how far a statistic of some runs is above a number that has no spread.

    The runs are drawn again with replacement, which says how much another set of seeds would have
    moved the statistic; nothing is known of how much other seeds would have moved the number.
    """
    mine = numpy.asarray(values, dtype=float)
    value = statistic(values, which) - fixed
    if len(mine) < 2:
        return Interval(value, None, None)
    drawn = numpy.random.default_rng(0).integers(0, len(mine), (RESAMPLES, len(mine)))
    return _interval(value, _over(mine[drawn], which) - fixed)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Return how far the median of some runs is above that of others, by their common seeds.

    A seed gives both the same order of samples, so seeds are drawn and each brings both its runs.

    Args:
        values: Value by seed.
        others: Likewise of the runs that are subtracted.

    Returns:
        None where they have no seed in common.
    """
    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return None
    mine, theirs = (numpy.array([each[seed] for seed in seeds]) for each in (values, others))
    value = float(numpy.median(mine) - numpy.median(theirs))
    if len(seeds) < 2:
        return Interval(value, None, None)
    drawn = numpy.random.default_rng(0).integers(0, len(seeds), (RESAMPLES, len(seeds)))
    return _interval(value, numpy.median(mine[drawn], axis=1) - numpy.median(theirs[drawn], axis=1))


def _over(values: numpy.ndarray, which: Statistic) -> numpy.ndarray:
    """Return a statistic along the last axis."""
    if which == "median":
        return numpy.median(values, axis=-1)
    lower, upper = numpy.percentile(values, (25, 75), axis=-1)
    return upper - lower


def _interval(value: float, drawn: numpy.ndarray) -> Interval:
    low, high = (float(end) for end in numpy.percentile(drawn, LEVEL))
    return Interval(value, low, high)
