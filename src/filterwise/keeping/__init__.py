"""Kept weights and gathered gradients: what a layer holds between two forwards.

======== =====================================================================================
kept     A kept weight, and the marks by which it is seen to be stale
gathered A kept weight of a window, and the gradient that micro-batches gathered on it
window   The window of one optimizer step: it is filled, closed, and guarded against steps
group    Layers that are filled and handed over together
nodes    The nodes of autograd that hand over
keeper   One layer's part: what its next forward computes with
======== =====================================================================================

A micro-batch inside `defer` computes with a leaf that shares the kept weight's storage, so autograd
itself adds up the gradient there. The first forward outside goes through a node that returns the
same storage, and whose backward adds what was gathered and applies the normalization's backward
once. Everything here is exact or says so with a `DeferralError`.
"""

from __future__ import annotations

from filterwise.keeping.keeper import Keeper
from filterwise.keeping.kept import Computation, are_own, are_shared, can_keep, compute
from filterwise.keeping.window import Entry, Window, watch_steps

__all__ = [
    "Computation",
    "Entry",
    "Keeper",
    "Window",
    "are_own",
    "are_shared",
    "can_keep",
    "compute",
    "watch_steps",
]
