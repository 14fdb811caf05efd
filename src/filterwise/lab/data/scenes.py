"""Pictures with objects in them: boxes, classes and, in some sets, masks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from filterwise.lab.data.folder import read_picture

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["Scene", "Scenes", "Thing", "box_fault", "masks_of", "tensors_of"]

TOLERANCE = 1.0
"""Pixels by which a box may stand over the edge: annotators round."""


class Thing(NamedTuple):
    """An object.

    Attributes:
        box: Left, top, right and bottom edge in pixels.
        label: Number of its class, from 1.
        area: In pixels, by which the metrics tell small from large.
        ignored: A crowd, or an object too difficult to be asked for: not trained on; in a test
            finding it counts neither for nor against.
        shape: Its mask as COCO JSON has it, polygons or run lengths; None without masks.
    """

    box: tuple[float, float, float, float]
    label: int
    area: float
    ignored: bool = False
    shape: Any = None


class Scene(NamedTuple):
    """A picture and what is in it."""

    path: Path
    width: int
    height: int
    things: tuple[Thing, ...]


class Scenes(NamedTuple):
    """One part of a set.

    Attributes:
        scenes: Pictures without objects among them.
        classes: Name of each label, the background's at 0.
        masks: Whether the things have shapes.
    """

    scenes: list[Scene]
    classes: tuple[str, ...]
    masks: bool


def box_fault(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[str, str] | None:
    """Return what is wrong with a box in a picture, in few words and with its values, or None."""
    left, top, right, bottom = box
    words = f"from {left:g}, {top:g} to {right:g}, {bottom:g} in a picture of {width}x{height}"
    if not all(math.isfinite(value) for value in box):
        return "box that is not finite", words
    if right <= left or bottom <= top:
        return "box without area", words
    inside = min(left, top) >= -TOLERANCE
    if not (inside and right <= width + TOLERANCE and bottom <= height + TOLERANCE):
        return "box outside the picture", words
    if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
        return "box without area", words
    return None


def tensors_of(scene: Scene, masks: bool, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Read a picture and what is in it.

    Returns:
        The picture as bytes ``(3, height, width)``, and ``boxes`` (objects, 4), ``labels``,
        ``area``, ``iscrowd`` (1 where ignored) and, if wanted, ``masks`` (objects, height, width).

    Raises:
        LabError: If the picture cannot be read.
    """
    picture = numpy.array(read_picture(str(scene.path)))
    # What is ignored is neither an example of its class nor of the background's.
    things = [thing for thing in scene.things if not (training and thing.ignored)]
    boxes = torch.tensor([thing.box for thing in things], dtype=torch.float32).reshape(-1, 4)
    limits = torch.tensor([scene.width, scene.height] * 2, dtype=torch.float32)
    target = {
        "boxes": boxes.clamp(min=0).minimum(limits),
        "labels": torch.tensor([thing.label for thing in things], dtype=torch.int64),
        "area": torch.tensor([thing.area for thing in things], dtype=torch.float32),
        "iscrowd": torch.tensor([int(thing.ignored) for thing in things], dtype=torch.int64),
    }
    if masks:
        target["masks"] = masks_of(things, scene.height, scene.width)
    return torch.from_numpy(picture).permute(2, 0, 1), target


def masks_of(things: list[Thing], height: int, width: int) -> Tensor:
    """Draw the shapes of things as ``(things, height, width)`` bytes of 0 and 1."""
    from faster_coco_eval.core import mask

    drawn = torch.zeros(len(things), height, width, dtype=torch.uint8)
    for place, thing in enumerate(things):
        runs: Any = thing.shape
        if isinstance(runs, list):
            polygons: Any = mask.frPyObjects(runs, height, width)
            runs = mask.merge(polygons)
        elif isinstance(runs["counts"], list):
            runs = mask.frPyObjects(runs, height, width)
        drawn[place] = torch.from_numpy(numpy.ascontiguousarray(mask.decode(runs)))
    return drawn
