"""Pascal VOC's layout: ``VOCdevkit/VOC2012`` with JPEGImages, Annotations and ImageSets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from filterwise.lab.data.faults import Fault, check_pictures
from filterwise.lab.data.scenes import Scene, Scenes, Thing, box_fault
from filterwise.lab.errors import LabError, UsageError, reason

__all__ = ["CLASSES", "VocPart", "class_names", "read_voc", "voc_parts"]

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
"""In the order of their numbers."""


class VocPart(NamedTuple):
    """A list of pictures: ``VOC2007/trainval``.

    Attributes:
        folder: Of the year.
        names: Of the pictures, without ending.
    """

    folder: Path
    names: list[str]


def voc_parts(folder: Path, lists: str) -> dict[str, Path]:
    """Return the lists of a folder by year and name.

    Args:
        folder: A VOCdevkit, what it lies in, or one year of it.
        lists: Folder in ImageSets: ``Main`` for boxes, ``Segmentation`` for maps.
    """
    kit = folder / "VOCdevkit" if (folder / "VOCdevkit").is_dir() else folder
    years = [kit] if (kit / "ImageSets").is_dir() else sorted(kit.glob("VOC*"))
    return {
        f"{year.name}/{file.stem}": file
        for year in years
        # The other files of Main are one for each class: aeroplane_train.txt.
        for file in sorted((year / "ImageSets" / lists).glob("*.txt"))
        if "_" not in file.stem
    }


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the classes of a folder, the background first: those of its classes.txt, or VOC's."""
    file = folder / "classes.txt"
    if not file.is_file():
        return CLASSES
    try:
        names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"--data: {file} cannot be read: {reason(error)}.") from None
    return (*([] if names[:1] == ["background"] else ["background"]), *names)


def names_in(file: Path) -> VocPart:
    """Read a list.

    Raises:
        LabError: If it cannot be read.
    """
    try:
        names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"--data: {file} cannot be read: {reason(error)}.") from None
    return VocPart(file.parents[2], names)


def read_voc(file: Path, classes: tuple[str, ...]) -> tuple[Scenes, list[Fault]]:
    """Read the pictures and boxes of a list, with all that is wrong in them.

    VOC's boxes are whole pixels from 1, both ends included: from 1 to 10 is an edge at 0 and one at
    10 here. Objects marked difficult are ignored.

    Raises:
        LabError: If the list cannot be read.
    """
    year, names = names_in(file)
    labels = {name: number for number, name in enumerate(classes)}
    faults: list[Fault] = []
    scenes: list[Scene] = []
    for name in names:
        path = year / "Annotations" / f"{name}.xml"
        try:
            root = ElementTree.parse(path).getroot()
            size = int(_text(root, "size/width")), int(_text(root, "size/height"))
        except (OSError, ValueError, ElementTree.ParseError) as error:
            kind = "annotation that cannot be read" if path.is_file() else "missing annotation"
            faults.append(Fault(str(path), "", kind, reason(error)))
            continue
        things = []
        for number, entry in enumerate(root.iter("object"), start=1):
            thing = _thing(entry, labels, size)
            if isinstance(thing, Thing):
                things.append(thing)
            else:
                faults.append(Fault(str(path), f"object {number}", *thing))
        scenes.append(Scene(year / "JPEGImages" / f"{name}.jpg", *size, tuple(things)))
    broken = check_pictures((scene.path, (scene.width, scene.height)) for scene in scenes)
    whole = [scene for scene in scenes if str(scene.path) not in broken]
    return Scenes(whole, classes, masks=False), [*broken.values(), *faults]


def _text(entry: ElementTree.Element, place: str) -> str:
    found = entry.findtext(place)
    if found is None:
        raise ValueError(f"it has no {place}")
    return found


def _thing(
    entry: ElementTree.Element, labels: dict[str, int], size: tuple[int, int]
) -> Thing | tuple[str, str]:
    try:
        name = _text(entry, "name").strip()
        left, top, right, bottom = (
            float(_text(entry, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError as error:
        return "object that cannot be read", reason(error)
    if labels.get(name, 0) == 0:
        return "unknown class", name
    box = (left - 1, top - 1, right, bottom)
    fault = box_fault(box, *size)
    if fault is not None:
        return fault
    area = (right - left + 1) * (bottom - top + 1)
    return Thing(box, labels[name], area, entry.findtext("difficult", "0").strip() == "1")


def no_layout(folder: Path, other: str) -> UsageError:
    """Return the error for a folder that has neither layout."""
    return UsageError(f"--data: {folder} has neither {other} nor a VOCdevkit with ImageSets.")
