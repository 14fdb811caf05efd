"""Which jobs can be run here, and why the others cannot: nothing is left out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from filterwise.lab.data import SETS
from filterwise.lab.data.loading import kept
from filterwise.lab.data.stream import find_tree
from filterwise.lab.errors import LabError
from filterwise.lab.nets import make

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.reproduce.jobs import Job
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["refusals"]


def refusals(jobs: Sequence[Job], *, look_at_data: bool = True) -> dict[str, str]:
    """Return why jobs cannot be run, by their keys.

    Args:
        jobs: All of them, those that others start with too.
        look_at_data: Whether data sets are looked for.
    """
    found: dict[str, str] = {}
    words: dict[tuple[str, ...], str | None] = {}
    for job in jobs:
        settings = job.settings
        model = settings.model
        checks = {("net", model.name, str(model.width)): _net}
        if look_at_data:
            checks["data", settings.data.name, str(settings.data.size)] = _data
        for key, check in checks.items():
            if key not in words:
                words[key] = check(settings)
            if words[key]:
                found.setdefault(job.key, str(words[key]))
    by_run = {job.settings.identity: job for job in jobs}
    for job in jobs:
        # What a run starts with comes before it.
        source = by_run.get(job.needs or "")
        if source and source.key in found and job.key not in found:
            found[job.key] = f"it starts with {source.label}: {found[source.key]}"
    return found


def _net(settings: TrainingSettings) -> str | None:
    if settings.task != "classification":
        return None
    try:
        with torch.device("meta"):
            make(settings.model.name, 3, 10, settings.model.width)
    except LabError as error:
        return str(error).removeprefix("--net: ")
    return None


def _data(settings: TrainingSettings) -> str | None:
    data, execution = settings.data, settings.execution
    if settings.task != "classification":
        return None
    try:
        if data.streamed:
            find_tree(data.name, execution.root)
        else:
            kept(data.name, execution.root, data.size, execution.download)
    except LabError as error:
        return _absent(settings) or str(error).replace("--root", "--data")
    return None


def _absent(settings: TrainingSettings) -> str | None:
    """Say what was looked for, if there is nothing at all of one of torchvision's sets."""
    name, root = settings.data.name.lower(), settings.execution.root
    if name not in SETS or settings.execution.download:
        return None
    here = Path(root).expanduser()
    folder = SETS[name].folder or name
    if any((here / each).exists() for each in (folder, f"{name}.npz", name)):
        return None
    return (
        f"{name} is not in {here.absolute()}: neither torchvision's files, nor {name}.npz, nor a"
        f" folder {name} with train/CLASS/picture and test/CLASS/picture. Name the folder that"
        " holds one of them with --data, or fetch it with --download."
    )
