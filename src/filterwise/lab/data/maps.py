"""Pictures with a map of classes: VOC's segmentation folders, and folders of masks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch

from filterwise.lab.data.detection import pick
from filterwise.lab.data.faults import READERS, Fault, check_pictures, settle
from filterwise.lab.data.folder import read_picture
from filterwise.lab.data.voc import class_names, names_in, no_layout, voc_parts
from filterwise.lab.errors import LabError, UsageError, reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["VOID", "MapData", "Mapped", "load_maps", "tensors_of_map"]

VOID = 255
"""Value of a pixel that belongs to no class, as VOC marks borders."""
ENDINGS = (".png", ".jpg", ".jpeg")


class Mapped(NamedTuple):
    """A picture and its map."""

    picture: Path
    map: Path


class MapData(NamedTuple):
    """What is trained and tested on.

    Attributes:
        train: To train on.
        test: To test on.
        classes: Name of each value of a map.
        origin: One sentence on where they come from.
        left_out: How many entries of each kind of fault were left out.
    """

    train: list[Mapped]
    test: list[Mapped]
    classes: tuple[str, ...]
    origin: str
    left_out: dict[str, int]


def load_maps(
    folder: Path, train: Sequence[str], test: Sequence[str], *, skip_bad: bool
) -> MapData:
    """Look through a folder, every picture and map of it.

    Args:
        folder: A VOCdevkit, or ``NAME/images`` and ``NAME/masks`` with ``classes.txt`` beside.
        train: Parts to train on; none: the first whose name begins with ``train``.
        test: Parts to test on; none: the first that begins with ``val`` or ``test``.
        skip_bad: Leave out what is faulty, and count it.

    Raises:
        UsageError: If the layout is neither, a part is not there, or an entry is faulty.
        LabError: If a list cannot be read.
    """
    lists = voc_parts(folder, "Segmentation")
    folders = {each.parent.name: each.parent for each in sorted(folder.glob("*/masks"))}
    if not lists and not folders:
        raise no_layout(folder, "NAME/images with NAME/masks")
    if folders and not lists and not (folder / "classes.txt").is_file():
        raise UsageError(
            f"--data: {folder} has no classes.txt: one name a line, in the order of the masks'"
            " values, the background first."
        )
    classes = class_names(folder)
    halves, faults = [], []
    for wanted, beginnings in ((train, ("train",)), (test, ("val", "test"))):
        found: list[Mapped] = []
        for name in pick(wanted, lists or folders, beginnings, folder):
            entries = _of_voc(lists[name]) if lists else _of_folder(folders[name])
            whole, wrong = _checked(entries, len(classes))
            found += whole
            faults += wrong
        halves.append(found)
    left_out = settle(faults, skip_bad)
    if not all(halves):
        raise UsageError(f"--data: {folder}: nothing is left to train or to test on.")
    origin = f"pictures with maps of classes in {folder}"
    return MapData(halves[0], halves[1], classes, origin, left_out)


def _of_voc(file: Path) -> list[Mapped]:
    year, names = names_in(file)
    # The augmented annotations of Hariharan et al., as everybody unpacks them.
    maps = year / "SegmentationClassAug"
    if not (file.stem.endswith("aug") and maps.is_dir()):
        maps = year / "SegmentationClass"
    return [Mapped(year / "JPEGImages" / f"{name}.jpg", maps / f"{name}.png") for name in names]


def _of_folder(folder: Path) -> list[Mapped]:
    pictures = sorted(p for p in (folder / "images").glob("*") if p.suffix.lower() in ENDINGS)
    return [Mapped(path, folder / "masks" / f"{path.stem}.png") for path in pictures]


def _checked(entries: list[Mapped], classes: int) -> tuple[list[Mapped], list[Fault]]:
    broken = check_pictures((entry.picture, None) for entry in entries)
    whole = [entry for entry in entries if str(entry.picture) not in broken]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda entry: _map_fault(entry, classes), whole))
    kept = [entry for entry, fault in zip(whole, found, strict=True) if fault is None]
    return kept, [*broken.values(), *(fault for fault in found if fault is not None)]


def _map_fault(entry: Mapped, classes: int) -> Fault | None:
    from PIL import Image

    name = str(entry.map)
    if not entry.map.is_file():
        return Fault(name, "", "missing mask")
    try:
        values = _values(entry.map)
        with Image.open(entry.picture) as picture:
            size = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Fault(name, "", "broken mask", reason(error))
    if values.ndim != 2:
        return Fault(name, "", "mask with colours in place of numbers")
    if values.shape != size[::-1]:
        words = f"{values.shape[1]}x{values.shape[0]}, the picture {size[0]}x{size[1]}"
        return Fault(name, "", "mask of another size", words)
    strange = sorted(set(numpy.unique(values).tolist()) - {*range(classes), VOID})
    if strange:
        words = f"{strange[0]}; there are {classes} classes, and {VOID} for none"
        return Fault(name, "", "value of no class", words)
    return None


def _values(path: Path) -> numpy.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return numpy.array(image)


def tensors_of_map(entry: Mapped) -> tuple[Tensor, Tensor]:
    """Read a picture ``(3, height, width)`` and its map ``(height, width)``, as bytes.

    Raises:
        LabError: If one cannot be read.
    """
    picture = torch.from_numpy(numpy.array(read_picture(str(entry.picture)))).permute(2, 0, 1)
    try:
        return picture, torch.from_numpy(_values(entry.map).astype(numpy.uint8))
    except (OSError, SyntaxError, ValueError) as error:
        raise LabError(f"--data: broken mask {entry.map}: {reason(error)}.") from None
