"""Clips as folders of frames, with lists of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch

from filterwise.lab.data.detection import pick
from filterwise.lab.data.faults import Fault, check_pictures, settle
from filterwise.lab.data.folder import read_picture
from filterwise.lab.errors import LabError, UsageError, reason

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Clip", "ClipData", "frames_of", "load_clips"]

ENDINGS = (".jpg", ".jpeg", ".png")
SUBSETS = "annos/videos_labels_subsets.txt"
CLASSES = "classes.txt"


class Clip(NamedTuple):
    """A clip's frames in their order, and the number of its class."""

    frames: tuple[Path, ...]
    label: int


class ClipData(NamedTuple):
    """What is trained and tested on.

    Attributes:
        train: To train on.
        test: To test on.
        classes: Names.
        origin: One sentence on where they come from.
        left_out: How many entries of each kind of fault were left out.
    """

    train: list[Clip]
    test: list[Clip]
    classes: tuple[str, ...]
    origin: str
    left_out: dict[str, int]


class _Entry(NamedTuple):
    file: Path
    line: int
    folder: Path
    label: str


def load_clips(folder: Path, frames: int, *, skip_bad: bool) -> ClipData:
    """Look through a folder of clips, every frame of it.

    Two layouts: ``train.txt`` and ``val.txt`` or ``test.txt`` with a line for each clip, its folder
    and the number of its class from 0 (a number of frames may stand between them, as TSN's lists
    have it), and ``classes.txt``; or UCF101's frames with ``annos/videos_labels_subsets.txt`` and
    ``annos/actions.txt``, whose numbers begin with 1.

    Args:
        folder: Which.
        frames: That a clip must have.
        skip_bad: Leave out what is faulty, and count it.

    Raises:
        UsageError: If the layout is neither, or an entry is faulty.
        LabError: If a list cannot be read.
    """
    if (folder / SUBSETS).is_file():
        classes, halves = _subsets(folder)
    else:
        lists = {file.stem: file for file in sorted(folder.glob("*.txt")) if file.name != CLASSES}
        if not lists or not (folder / CLASSES).is_file():
            raise UsageError(
                f"--data: {folder} has neither train.txt, val.txt and {CLASSES} nor {SUBSETS}."
            )
        classes = tuple(_lines(folder / CLASSES))
        halves = [
            [entry for name in pick((), lists, names, folder) for entry in _listed(lists[name])]
            for names in (("train",), ("val", "test"))
        ]
    found, faults = [], []
    for entries in halves:
        clips, wrong = _checked(entries, len(classes), frames)
        found.append(clips)
        faults += wrong
    left_out = settle(faults, skip_bad)
    if not all(found):
        raise UsageError(f"--data: {folder}: no clip is left to train or to test on.")
    origin = f"frames of clips in {folder}, lists of its own"
    return ClipData(found[0], found[1], classes, origin, left_out)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"--data: {file} cannot be read: {reason(error)}.") from None


def _listed(file: Path) -> list[_Entry]:
    entries = []
    for number, line in enumerate(_lines(file), start=1):
        words = line.split()
        entries.append(_Entry(file, number, file.parent / words[0], words[-1]))
    return entries


def _subsets(folder: Path) -> tuple[tuple[str, ...], list[list[_Entry]]]:
    classes = tuple(line.split()[-1] for line in _lines(folder / "annos" / "actions.txt"))
    file = folder / SUBSETS
    halves: list[list[_Entry]] = [[], []]
    places = [each for each in sorted(folder.iterdir()) if each.is_dir() and each.name != "annos"]
    for number, line in enumerate(_lines(file), start=1):
        words = line.split()
        if len(words) != 3 or words[2] not in ("1", "2") or not words[1].isdigit():
            raise UsageError(
                f"--data: {file} line {number}: {line!r} is not a clip, a class and 1 (train) or 2"
                " (test)."
            )
        found = [each / words[0] for each in places if (each / words[0]).is_dir()]
        where = found[0] if found else folder / words[0]
        halves[int(words[2]) - 1].append(_Entry(file, number, where, str(int(words[1]) - 1)))
    return classes, halves


def _checked(entries: list[_Entry], classes: int, frames: int) -> tuple[list[Clip], list[Fault]]:
    clips: list[tuple[_Entry, Clip]] = []
    faults: list[Fault] = []

    def fault(entry: _Entry, kind: str, detail: str) -> None:
        faults.append(Fault(str(entry.file), f"line {entry.line}", kind, detail))

    for entry in entries:
        if not entry.label.isdigit() or int(entry.label) >= classes:
            fault(entry, "unknown class", f"{entry.label}; there are {classes}")
        elif not entry.folder.is_dir():
            fault(entry, "missing clip", str(entry.folder))
        else:
            found = tuple(
                sorted(each for each in entry.folder.iterdir() if each.suffix.lower() in ENDINGS)
            )
            if len(found) < frames:
                words = f"{entry.folder} has {len(found)} frames, {frames} are asked for"
                fault(entry, "clip that is too short", words)
            else:
                clips.append((entry, Clip(found, int(entry.label))))
    broken = check_pictures((path, None) for _, clip in clips for path in clip.frames)
    kept = []
    for entry, clip in clips:
        torn = [broken[str(path)] for path in clip.frames if str(path) in broken]
        if torn:
            fault(entry, "clip with a broken frame", str(torn[0]))
        else:
            kept.append(clip)
    return kept, faults


def frames_of(clip: Clip, count: int, training: bool) -> Tensor:
    """Read one frame out of each of `count` equal parts of a clip: drawn, or the middle one.

    Returns:
        Bytes ``(count, 3, height, width)``.

    Raises:
        LabError: If one cannot be read.
    """
    edges = torch.linspace(0, len(clip.frames), count + 1)
    starts, ends = edges[:-1], edges[1:]
    within = torch.rand(count) if training else torch.full((count,), 0.5)
    places = (starts + within * (ends - starts)).long().clamp(max=len(clip.frames) - 1)
    pictures = [
        torch.from_numpy(numpy.array(read_picture(str(clip.frames[place]))))
        for place in places.tolist()
    ]
    if len({picture.shape for picture in pictures}) > 1:
        raise LabError(f"--data: the frames of {clip.frames[0].parent} have several sizes.")
    return torch.stack(pictures).permute(0, 3, 1, 2)
