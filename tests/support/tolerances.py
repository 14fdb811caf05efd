"""The one table of tolerances: what "equal to rounding" means in each dtype."""

from __future__ import annotations

import torch

DTYPES = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}

TOLERANCE = {
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float32: 1e-6,
    torch.float64: 1e-13,
}
"""T of the laws, relative to the scale that each law names."""

CLOSED_FORM = {**TOLERANCE, torch.float64: 1e-12}
"""Gradients against their closed form, relative to the filter's largest entry."""

REFERENCE_FLOOR = {
    torch.float16: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float32: 1e-6,
    torch.float64: 1e-13,
}
"""Law 3's absolute part, relative to the filter's largest entry."""

OUTPUT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Outputs of a layer or model, relative to the largest."""

WRONG = 100.0
"""A property that a method does not have must fail by at least this many tolerances."""
