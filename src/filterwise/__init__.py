"""Weight-space normalization for PyTorch: exact, convertible onto any model, foldable."""

from __future__ import annotations

__version__ = "0.1.0"
