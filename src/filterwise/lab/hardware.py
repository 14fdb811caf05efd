"""What a run ran on: versions and hardware, as they stand in every record."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import filterwise as fw
from filterwise.lab.settings import cores

__all__ = ["commit", "hardware", "peak_memory", "versions"]

PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "scikit-learn", "pillow")


def versions(*more: str) -> dict[str, str]:
    """Return the versions of what a run's numbers depend on, and of more packages."""
    found = {"filterwise": fw.__version__, "python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit that this checkout stands at, with ``+`` where files were changed."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # Installed into somebody else's repository: its commit says nothing.
    return found.stdout.strip() if tracked.returncode == 0 else None


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use: on a GPU by tensors there, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


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
