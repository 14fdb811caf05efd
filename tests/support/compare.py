"""The one comparison: it asserts by itself and says what is worst, where, and by how much."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    absolute: float | Tensor = 0.0,
    relative: float = 0.0,
    what: str = "value",
) -> None:
    """Assert ``|actual - expected| <= absolute + relative * |expected|``, entry by entry.

    Both sides are compared in float64. NaN equals NaN and an infinity equals itself, so that a
    reference may hold them; NaN against a number never passes.

    Args:
        actual: What the code gave.
        expected: What it should have given; broadcasts against `actual`.
        absolute: Largest difference allowed, a number or one that broadcasts.
        relative: Largest difference allowed in units of the expected entry.
        what: Subject of the message.
    """
    actual = actual.detach().to(torch.float64)
    expected = expected.detach().to(torch.float64).expand_as(actual)
    bound = torch.as_tensor(absolute, dtype=torch.float64).expand_as(actual)
    bound = bound + torch.nan_to_num(relative * expected.abs())
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (actual - expected).abs())
    misses = ~(difference <= bound)
    if misses.any():
        raise AssertionError(_report(actual, expected, difference, bound, misses, what))


def assert_same(actual: Tensor, expected: Tensor, what: str = "value") -> None:
    """Assert that two tensors have the same dtype, shape and bits (NaN equal to NaN)."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} in place of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} in place of {expected.shape}"
    assert_close(actual, expected, what=what)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def per_row(values: Tensor) -> Tensor:
    """Return the largest magnitude of each row as a column, in float64: the scale of a filter."""
    return values.detach().double().flatten(1).abs().amax(1, keepdim=True)


def _report(
    actual: Tensor, expected: Tensor, difference: Tensor, bound: Tensor, misses: Tensor, what: str
) -> str:
    excess = torch.where(misses, torch.nan_to_num(difference / bound, nan=torch.inf), -1.0)
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    got, wanted = float(actual[index]), float(expected[index])
    return (
        f"{what}: {int(misses.sum())} of {misses.numel()} entries miss; the worst at {list(index)}:"
        f" got {got!r}, expected {wanted!r}, difference {float(difference[index]):.3g}, "
        f"allowed {float(bound[index]):.3g} ({float(excess[index]):.3g} times as much)"
    )
