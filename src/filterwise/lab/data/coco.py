"""COCO JSON: ``annotations/instances_NAME.json`` beside the pictures in ``NAME``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filterwise.lab.data.faults import Fault, check_pictures
from filterwise.lab.data.scenes import TOLERANCE, Scene, Scenes, Thing, box_fault
from filterwise.lab.errors import LabError, UsageError, reason

__all__ = ["coco_parts", "read_coco"]

BEFORE = "instances_"


def coco_parts(folder: Path) -> dict[str, Path]:
    """Return the annotation files of a folder by the part's name: ``train2017``."""
    files = sorted((folder / "annotations").glob(f"{BEFORE}*.json"))
    return {file.stem.removeprefix(BEFORE): file for file in files}


def read_coco(file: Path, pictures: Path) -> tuple[Scenes, list[Fault]]:
    """Read one part, with all that is wrong in it.

    Categories are numbered from 1 in the order of their ids; 0 is the background. Scenes and things
    with a fault are left out.

    Args:
        file: The JSON.
        pictures: Folder that the file names in it are relative to.

    Raises:
        LabError: If the file cannot be read.
        UsageError: If it is no COCO JSON.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise LabError(f"--data: {file} cannot be read: {reason(error)}.") from None
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UsageError(f"--data: {file} is no COCO JSON: it has no {', '.join(missing)}.")
    categories = sorted(content["categories"], key=lambda each: each["id"])
    labels = {each["id"]: number for number, each in enumerate(categories, start=1)}
    classes = ("background", *(str(each["name"]) for each in categories))
    reader = _Reader(file, pictures, labels)
    reader.read_images(content["images"])
    masks = any(entry.get("segmentation") for entry in content["annotations"])
    for entry in content["annotations"]:
        reader.read_thing(entry, masks)
    return Scenes(reader.scenes(), classes, masks), reader.faults


class _Reader:
    def __init__(self, file: Path, pictures: Path, labels: dict[Any, int]) -> None:
        self._file, self._pictures, self._labels = str(file), pictures, labels
        self._images: dict[Any, tuple[Path, int, int]] = {}
        self._things: dict[Any, list[Thing]] = {}
        self.faults: list[Fault] = []

    def read_images(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            try:
                size = int(entry["width"]), int(entry["height"])
                self._images[entry["id"]] = (self._pictures / entry["file_name"], *size)
            except (KeyError, TypeError, ValueError) as error:
                name = f"image {entry.get('id', '?')}"
                self._fault(name, "image entry that cannot be read", reason(error))
        broken = check_pictures((path, (wide, high)) for path, wide, high in self._images.values())
        self.faults += broken.values()
        self._broken = {key for key, image in self._images.items() if str(image[0]) in broken}

    def read_thing(self, entry: dict[str, Any], masks: bool) -> None:
        name = f"annotation {entry.get('id', '?')}"
        try:
            image, category = entry["image_id"], entry["category_id"]
            left, top, width, height = (float(value) for value in entry["bbox"])
        except (KeyError, TypeError, ValueError) as error:
            self._fault(name, "annotation that cannot be read", reason(error))
            return
        if image not in self._images:
            self._fault(name, "annotation of an image that is not listed", f"image {image}")
            return
        if category not in self._labels:
            self._fault(name, "unknown class", f"category {category}")
            return
        size = self._images[image][1:]
        box = (left, top, left + width, top + height)
        shape = entry.get("segmentation")
        fault = box_fault(box, *size) or (_shape_fault(shape, *size) if masks else None)
        if fault is not None:
            self._fault(name, *fault)
            return
        area = float(entry.get("area", width * height))
        ignored = bool(entry.get("iscrowd", 0))
        thing = Thing(box, self._labels[category], area, ignored, shape if masks else None)
        self._things.setdefault(image, []).append(thing)

    def scenes(self) -> list[Scene]:
        return [
            Scene(*image, tuple(self._things.get(key, ())))
            for key, image in self._images.items()
            if key not in self._broken
        ]

    def _fault(self, entry: str, kind: str, detail: str = "") -> None:
        self.faults.append(Fault(self._file, entry, kind, detail))


def _shape_fault(shape: Any, width: int, height: int) -> tuple[str, str] | None:
    """Return what is wrong with a mask, or None."""
    if not shape:
        return "object without mask", ""
    if isinstance(shape, list):
        for polygon in shape:
            if len(polygon) < 6 or len(polygon) % 2:
                return "polygon of fewer than three points", f"{len(polygon)} numbers"
            across, down = polygon[::2], polygon[1::2]
            inside = min(*across, *down) >= -TOLERANCE
            if not (
                inside and max(across) <= width + TOLERANCE and max(down) <= height + TOLERANCE
            ):
                return "mask outside the picture", f"to {max(across):g}, {max(down):g}"
        return None
    size = list(shape.get("size", ()))
    if size != [height, width]:
        words = f"{'x'.join(str(side) for side in reversed(size))}, the picture {width}x{height}"
        return "mask of another size", words
    return None
