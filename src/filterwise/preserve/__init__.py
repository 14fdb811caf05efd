"""Conversion that keeps the function: what goes where, how near it came, and a pass over data."""

from __future__ import annotations

from filterwise.preserve.batches import Batches
from filterwise.preserve.carry import Carry, find_carries
from filterwise.preserve.preservation import Preservation

__all__ = ["Batches", "Carry", "Preservation", "find_carries"]
