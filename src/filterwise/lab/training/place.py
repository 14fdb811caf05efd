"""Where a run takes place: device, precision and processes, through Lightning Fabric."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.errors import UsageError, reason

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["be_deterministic", "make_fabric"]


def make_fabric(device: str = "cpu", precision: Any = "32-true") -> Fabric:
    """Return a launched Fabric for one process, or for all that ``torchrun`` has started.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``, ... Several processes take the kind alone, and each
            the device of its own number.
        precision: As Fabric names it.

    Raises:
        UsageError: If there is no such device.
    """
    place = torch.device(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    options: dict[str, Any] = {"accelerator": place.type, "precision": precision}
    if processes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        nodes = int(os.environ["WORLD_SIZE"]) // processes
        options |= {"devices": processes, "num_nodes": nodes, "strategy": "ddp"}
    elif place.type == "cuda":
        options["devices"] = [place.index or 0]
    else:
        options["devices"] = 1
    kind = _fabric_class()
    try:
        with warnings.catch_warnings():
            # It warns of what its own Trainer would need (more data workers, SLURM's srun).
            warnings.filterwarnings("ignore", module="lightning_fabric")
            fabric = kind(**options)
            fabric.launch()
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--device: {device!r} cannot be used here: {reason(error)}.") from None
    return fabric


def _fabric_class() -> type[Fabric]:
    """Import Fabric alone.

    It asks for the version of torchmetrics by importing the whole of it, with torchvision and
    scipy: 1.2 s of 1.8 beside what torch's optimizers import in any case. Only its
    spike detection, which is not used here, looks at the answer.
    """
    hidden = "lightning_fabric" not in sys.modules and "torchmetrics" not in sys.modules
    if hidden:
        sys.modules["torchmetrics"] = None  # type: ignore[assignment]
    try:
        from lightning_fabric import Fabric
    finally:
        if hidden:
            del sys.modules["torchmetrics"]
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    return Fabric


def be_deterministic(strictly: bool) -> None:
    """Make torch choose the same algorithms every time; strictly: refuse those that cannot."""
    if strictly:
        # CUDA's matrix products ask for it; read when the device is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(strictly)
