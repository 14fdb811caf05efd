"""The family kernel: effective weights and their gradients, forward and backward."""

from __future__ import annotations

from filterwise.kernel.choice import check_kernel, resolve
from filterwise.kernel.family import Family, Gradients, Kernel, Layer, Saved
from filterwise.kernel.function import serving, standardize
from filterwise.kernel.many import Call, backward, forward

__all__ = [
    "Call",
    "Family",
    "Gradients",
    "Kernel",
    "Layer",
    "Saved",
    "backward",
    "check_kernel",
    "forward",
    "resolve",
    "serving",
    "standardize",
]
