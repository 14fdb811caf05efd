"""What the command line says of a cluster."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from filterwise.lab.cluster.on_ray import OnRay
from filterwise.lab.cluster.on_slurm import OnSlurm
from filterwise.lab.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from filterwise.lab.reproduce.jobs import Executor

__all__ = ["Where", "cluster_executor"]

Where = Literal["local", "ray", "slurm"]
"""Who does the runs: a pool of processes here, Ray, or SLURM."""

PACKAGES = {"ray": "ray", "slurm": "submitit"}


def cluster_executor(
    where: Literal["ray", "slurm"],
    *,
    folder: Path,
    device: str,
    workers: int | None,
    options: Sequence[str] = (),
) -> Executor:
    """Return the executor of a cluster.

    Args:
        where: Which.
        folder: Of the results; logs of SLURM's jobs go below it.
        device: Where a run is trained; on a GPU each has one, or the share that `options` say.
        workers: Runs at a time at most; None: as many as the cluster takes.
        options: ``name=value`` each: for Ray ``address``, ``cpus`` and ``gpus`` of a run, and
            ``retries``; for SLURM what sbatch takes, such as ``partition=gpu``,
            ``cpus-per-task=8`` or ``time=04:00:00``.

    Raises:
        UsageError: If the extra is not installed, or an option cannot be.
    """
    package = PACKAGES[where]
    if find_spec(package) is None:
        raise UsageError(
            f"--executor {where} needs {package}, which is not installed: pip install"
            " 'filterwise[cluster]'"
        )
    if ":" in device:
        raise UsageError(
            f"--device {device}: a cluster hands out the GPUs itself: --device"
            f" {device.partition(':')[0]}."
        )
    found = dict(_option(text) for text in options)
    gpus = 0 if device == "cpu" else 1
    # On a GPU the other cores read and change pictures.
    threads = 4 if gpus else 1
    if where == "ray":
        return OnRay.of(found, threads=threads, gpus=gpus, workers=workers)
    return OnSlurm.of(found, folder=folder, threads=threads, gpus=gpus, workers=workers)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--cluster-option: {text!r} is not of the form name=value.")
    return name.strip().lstrip("-"), value.strip()
