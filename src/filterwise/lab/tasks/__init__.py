"""What can be learned: each task is a module with its data, model, loss and metrics."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from filterwise.lab.errors import UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from filterwise.lab.tasks.task import Task
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["TASKS", "make_task"]

TASKS = {
    "classification": "filterwise.lab.tasks.classification:Classification",
    "detection": "filterwise.lab.tasks.detection:Detection",
    "segmentation": "filterwise.lab.tasks.segmentation:Segmentation",
    "video": "filterwise.lab.tasks.video:Video",
    "points": "filterwise.lab.tasks.points:Points",
}
"""Every task by its name: the class that makes it, from settings and a Fabric."""


def make_task(settings: TrainingSettings, fabric: Fabric) -> Task:
    """Make the task that settings name: its data read and its model built.

    Raises:
        UsageError: If there is no such task, data set or model.
        LabError: If a file is missing or broken.
    """
    if settings.task not in TASKS:
        nearest = get_close_matches(settings.task, TASKS, n=1) or list(TASKS)
        raise UsageError(f"there is no task {settings.task!r}. Nearest: {nearest[0]}.")
    module, name = TASKS[settings.task].split(":")
    return getattr(import_module(module), name)(settings, fabric)
