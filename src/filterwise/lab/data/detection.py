"""Folders of pictures with objects, in whichever of the usual layouts they are."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filterwise.lab.data.coco import coco_parts, read_coco
from filterwise.lab.data.faults import settle
from filterwise.lab.data.voc import class_names, no_layout, read_voc, voc_parts
from filterwise.lab.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from filterwise.lab.data.faults import Fault
    from filterwise.lab.data.scenes import Scenes

__all__ = ["DetectionData", "find_folder", "load_scenes"]


class DetectionData(NamedTuple):
    """What is trained and tested on.

    Attributes:
        train: Scenes to train on.
        test: Scenes to test on.
        origin: One sentence on where they come from.
        left_out: How many entries of each kind of fault were left out.
    """

    train: Scenes
    test: Scenes
    origin: str
    left_out: dict[str, int]


def find_folder(name: str, root: str) -> Path:
    """Return the folder that a set's name or a path means.

    Raises:
        UsageError: If there is none.
    """
    for path in (Path(root).expanduser() / name, Path(name).expanduser()):
        if path.is_dir():
            return path.resolve()
    raise UsageError(
        f"--data: there is no folder {name}, here or in {root}. Name the folder that data sets lie"
        " in with --root."
    )


def load_scenes(
    folder: Path, train: Sequence[str], test: Sequence[str], *, skip_bad: bool
) -> DetectionData:
    """Read a folder with COCO JSON, or a VOCdevkit.

    Args:
        folder: With ``annotations/instances_NAME.json`` and the pictures in ``NAME``, or with
            ``VOC2007`` and the like, whose parts are then named ``VOC2007/trainval``.
        train: Parts to train on; none: the one whose name begins with ``train``.
        test: Parts to test on; none: the one that begins with ``val`` or ``test``.
        skip_bad: Leave out what is faulty, and count it.

    Raises:
        UsageError: If the layout is none of these, a part is not there, or an entry is faulty.
        LabError: If a file cannot be read.
    """
    parts = coco_parts(folder)
    lists = voc_parts(folder, "Main")
    if not parts and not lists:
        raise no_layout(folder, "annotations/instances_NAME.json (COCO)")

    def read(name: str) -> tuple[Scenes, list[Fault]]:
        if parts:
            return read_coco(parts[name], folder / name)
        return read_voc(lists[name], class_names(folder))

    named = {
        "train": pick(train, parts or lists, ("train",), folder),
        "test": pick(test, parts or lists, ("val", "test"), folder),
    }
    return gather(read, named, folder, skip_bad)


def pick(
    wanted: Sequence[str], parts: Iterable[str], beginnings: tuple[str, ...], folder: Path
) -> list[str]:
    """Return the parts that are named, or the first that begins as one usually does.

    Raises:
        UsageError: If there is none.
    """
    parts = list(parts)
    known = ", ".join(parts)
    for name in wanted:
        if name not in parts:
            nearest = get_close_matches(name, parts, n=1)
            hint = f"Nearest: {nearest[0]}." if nearest else f"There are {known}."
            raise UsageError(f"--data: {folder} has no part {name!r}. {hint}")
    if wanted:
        return list(wanted)
    for beginning in beginnings:
        found = [name for name in parts if name.rpartition("/")[2].startswith(beginning)]
        if found:
            return found[:1]
    raise UsageError(
        f"--data: {folder} has no part whose name begins with {' or '.join(beginnings)}, only"
        f" {known}. Name it in options.train or options.test."
    )


def gather(
    read: Callable[[str], tuple[Scenes, list[Fault]]],
    named: dict[str, list[str]],
    folder: Path,
    skip_bad: bool,
) -> DetectionData:
    """Read all parts, settle their faults together, and put them together by half.

    Raises:
        UsageError: If an entry is faulty, the parts have other classes, or nothing is left.
    """
    halves, faults = {}, []
    for half, names in named.items():
        found = []
        for name in names:
            scenes, wrong = read(name)
            found.append(scenes)
            faults += wrong
        halves[half] = found
    left_out = settle(faults, skip_bad)
    first = halves["train"][0]
    for half, found in halves.items():
        for name, scenes in zip(named[half], found, strict=True):
            if scenes.classes != first.classes:
                raise UsageError(
                    f"--data: {folder}: the part {name} has other classes than {named['train'][0]}."
                )
        if not any(scenes.scenes for scenes in found):
            raise UsageError(f"--data: {folder}: nothing is left in {', '.join(named[half])}.")
    joined = {
        half: found[0]._replace(
            scenes=[scene for scenes in found for scene in scenes.scenes],
            masks=all(scenes.masks for scenes in found),
        )
        for half, found in halves.items()
    }
    origin = (
        f"pictures with objects in {folder}: {', '.join(named['train'])} to train on,"
        f" {', '.join(named['test'])} to test on"
    )
    return DetectionData(joined["train"], joined["test"], origin, left_out)
