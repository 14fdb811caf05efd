"""Conversion that keeps the function: what goes where, a pass over data, how near it came."""

from __future__ import annotations

from filterwise.preserve.batches import Batches
from filterwise.preserve.preservation import Preservation

__all__ = ["Batches", "Preservation"]
