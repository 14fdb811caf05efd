"""Histograms of a fixed size: one row a filter or channel, which add up over batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BINS", "histogram"]

BINS = 64


def histogram(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return counts ``(rows, 64)`` of equal bins from `low` to `high`, in float64.

    Values outside are counted in the end bins, values that are not a number nowhere. Where
    ``high <= low`` everything is in one bin in the middle.

    Args:
        rows: ``(rows, values)``.
        low: ``(rows,)``.
        high: ``(rows,)``.
    """
    low, high = low.to(rows.dtype)[:, None], high.to(rows.dtype)[:, None]
    width = (high - low) / BINS
    flat = width <= 0
    places = (rows - low) / torch.where(flat, torch.ones_like(width), width)
    places = torch.where(flat, torch.full_like(places, BINS // 2), places)
    counted = places.isfinite() | places.isinf()
    places = places.clamp(0, BINS - 1).nan_to_num(0).long()
    places += torch.arange(len(rows), device=rows.device)[:, None] * BINS
    counts = torch.zeros(len(rows) * BINS, device=rows.device, dtype=torch.float64)
    counts.scatter_add_(0, places.flatten(), counted.flatten().double())
    return counts.view(len(rows), BINS)
