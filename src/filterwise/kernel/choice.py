"""Which kernel serves: by name, by what is installed, and by device."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from filterwise.kernel.family import Kernel

if TYPE_CHECKING:
    import torch

__all__ = ["check_kernel", "resolve"]


def check_kernel(kernel: object) -> None:
    """Refuse a name that is not a kernel's.

    Raises:
        ValueError: If it is not.
    """
    names = get_args(Kernel)
    if kernel not in names:
        raise ValueError(f"kernel must be one of {', '.join(names)}, got {kernel!r}")


def resolve(kernel: Kernel, device: torch.device | str) -> str:
    """Return the kernel that serves on a device: what ``"auto"`` means there, or the one named.

    Raises:
        ValueError: If there is no kernel of that name.
    """
    del device
    check_kernel(kernel)
    return "eager"
