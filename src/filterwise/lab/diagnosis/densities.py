"""From a histogram's counts to a density curve."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Density", "density"]

POINTS = 97


class Density(NamedTuple):
    """A density on a grid.

    Attributes:
        at: Values.
        height: Density there.
        total: Values that were counted.
    """

    at: list[float]
    height: list[float]
    total: int


def density(row: Sequence[float]) -> Density | None:
    """Smooth a histogram (low, high and counts) with a normal kernel of Silverman's width.

    ``1.06 s count^(-1/5)``, at least half a bin. None where nothing was counted or all values are
    one.
    """
    low, high, counts = row[0], row[1], np.asarray(row[2:], dtype=float)
    count = counts.sum()
    if not count or not np.isfinite([low, high]).all() or high <= low:
        return None
    width = (high - low) / len(counts)
    centres = low + width * (np.arange(len(counts)) + 0.5)
    mean = (counts * centres).sum() / count
    deviation = np.sqrt((counts * (centres - mean) ** 2).sum() / count)
    kernel = max(1.06 * deviation * count**-0.2, width / 2)
    at = np.linspace(low, high, POINTS)
    bumps = np.exp(-0.5 * ((at[:, None] - centres[None]) / kernel) ** 2)
    height = (bumps * counts).sum(1) / (count * kernel * np.sqrt(2 * np.pi))
    return Density(at.tolist(), height.tolist(), int(count))
