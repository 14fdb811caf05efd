"""Which kernel serves: by name, by what is installed, and by device."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import TYPE_CHECKING, Any, get_args

from filterwise.errors import FilterwiseWarning
from filterwise.kernel.family import Kernel

if TYPE_CHECKING:
    import torch

__all__ = ["check_kernel", "module_of", "resolve"]

MODULES = {
    "numba": "filterwise.kernel.cpu",
    "triton": "filterwise.kernel.triton_gpu",
    "eager": "filterwise.kernel.eager",
}
DEVICES = {"numba": "cpu", "triton": "cuda"}
INSTALL = {
    "numba": "pip install 'filterwise[fast]'",
    "triton": "pip install triton (it comes with torch for CUDA on Linux)",
}
EVERYWHERE = "kernel='eager' runs everywhere, and kernel='auto' takes the fastest that can"


def check_kernel(kernel: object) -> None:
    """Refuse a name that is not a kernel's, or a kernel that is not installed.

    Raises:
        ValueError: With what to install.
    """
    names = get_args(Kernel)
    if kernel not in names:
        raise ValueError(f"kernel must be one of {', '.join(names)}, got {kernel!r}")
    if isinstance(kernel, str) and kernel in DEVICES and not _works(kernel):
        raise ValueError(
            f"kernel={kernel!r} needs {kernel}, which cannot be used here: {INSTALL[kernel]};"
            f" {EVERYWHERE}"
        )


@functools.lru_cache(maxsize=256)
def resolve(kernel: Kernel, device: torch.device | str) -> str:
    """Return the kernel that serves on a device: what ``"auto"`` means there, or the one named.

    On the device ``meta``, where nothing is computed, it is always ``"eager"``.

    Raises:
        ValueError: If there is no kernel of that name, it is not installed, or it does not run on
            this device.
    """
    kind = str(device).partition(":")[0]
    if kernel == "auto":
        names = [name for name, home in DEVICES.items() if home == kind and _works(name)]
        return names[0] if names else "eager"
    check_kernel(kernel)
    if kind == "meta":
        return "eager"
    if DEVICES.get(kernel, kind) != kind:
        raise ValueError(
            f"kernel={kernel!r} runs on {DEVICES[kernel]}, and the weight is on {kind};"
            f" {EVERYWHERE}"
        )
    return kernel


@functools.cache
def module_of(kernel: str) -> Any:
    """Return the module that has a kernel's ``forward`` and ``backward``, importing it if need be.

    Args:
        kernel: As `resolve` gave it.
    """
    return importlib.import_module(MODULES[kernel])


@functools.cache
def _works(name: str) -> bool:
    """Tell whether a kernel can be used, and warn of one that is installed but cannot."""
    try:
        package = importlib.import_module(name)
        if name == "numba" and package.config.DISABLE_JIT:
            return False  # somebody debugs other code of theirs
        module_of(name).prepare()
    except Exception as broken:  # what a package of the wrong build raises is its own affair
        if isinstance(broken, ModuleNotFoundError) and broken.name == name:
            return False
        warnings.warn(
            f"{name} is installed but cannot be used ({type(broken).__name__}: {broken});"
            " effective weights are computed by plain torch operations."
            " Mend, reinstall or remove it.",
            FilterwiseWarning,
            stacklevel=2,
        )
        return False
    return True
