"""The family kernel: effective weights and their gradients, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from filterwise.kernel import eager
from filterwise.kernel.family import Family, Kernel

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.filters import FilterLayout

__all__ = ["Family", "Kernel", "check_kernel", "standardize"]


def check_kernel(kernel: object) -> None:
    """Refuse a name that is not a kernel's.

    Raises:
        ValueError: If it is not.
    """
    names = get_args(Kernel)
    if kernel not in names:
        raise ValueError(f"kernel must be one of {', '.join(names)}, got {kernel!r}")


def standardize(
    weight: Tensor,
    family: Family,
    layout: FilterLayout,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    kernel: Kernel = "auto",
) -> Tensor:
    """Compute an effective weight by the kernel of that name (`eager.standardize` has the formula).

    Raises:
        ValueError: If there is no kernel of that name.
    """
    check_kernel(kernel)
    return eager.standardize(weight, family, layout, gain, offset)
