"""What a run ran on: versions and hardware, as they stand in every record."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch

import filterwise as fw
from filterwise.lab.settings import cores

__all__ = ["hardware", "versions"]

PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "scikit-learn", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of what a run's numbers depend on."""
    found = {"filterwise": fw.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, str | int]:
    """Return processor, cores and threads of this process and, on a GPU, its name."""
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
