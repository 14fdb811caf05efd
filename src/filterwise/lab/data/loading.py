"""Sets of pictures by name or path, whole in memory."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from filterwise.lab.data.archive import read_archive
from filterwise.lab.data.folder import read_folder
from filterwise.lab.data.office import DOMAINS, read_office
from filterwise.lab.data.pictures import PictureSet
from filterwise.lab.errors import LabError, UsageError, reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["NAMES", "SETS", "kept", "load"]


class _Source(NamedTuple):
    """How one of torchvision's sets is opened, and where it keeps its pictures.

    Attributes:
        kind: Name of the class in torchvision.
        train: Arguments for each part of the training half.
        test: Arguments for the test half.
        labels: Where it keeps them.
        channels_last: Whether pictures lie as (height, width, channels).
        folder: What it looks for under the root, where others of the same name may lie.
    """

    kind: str
    train: tuple[dict[str, Any], ...]
    test: dict[str, Any]
    labels: str = "targets"
    channels_last: bool = False
    folder: str = ""


_BY_TRAIN = (({"train": True},), {"train": False})
SETS = {
    "cifar10": _Source("CIFAR10", *_BY_TRAIN, channels_last=True, folder="cifar-10-batches-py"),
    "cifar100": _Source("CIFAR100", *_BY_TRAIN, channels_last=True, folder="cifar-100-python"),
    "fashionmnist": _Source("FashionMNIST", *_BY_TRAIN),
    "kmnist": _Source("KMNIST", *_BY_TRAIN),
    "mnist": _Source("MNIST", *_BY_TRAIN),
    "svhn": _Source("SVHN", ({"split": "train"},), {"split": "test"}, labels="labels"),
    "svhn+extra": _Source(
        "SVHN", ({"split": "train"}, {"split": "extra"}), {"split": "test"}, labels="labels"
    ),
    "usps": _Source("USPS", *_BY_TRAIN),
}
"""Torchvision's sets of small pictures, by the name that ``--data`` takes."""

NAMES = ("digits", *SETS, *(f"office31/{domain}" for domain in DOMAINS))
"""Every set that has a name."""


def load(
    data: str,
    *,
    root: str = "data",
    size: int = 32,
    download: bool = False,
    progress: Callable[[float], None] = lambda _share: None,
) -> PictureSet:
    """Load pictures by name or path.

    A named set is looked for under the root as torchvision keeps it, then as ``NAME.npz``, then as
    a class-folder tree ``NAME``; the last two may hold other pictures than torchvision's files, and
    the origin of the set says which they were.

    Args:
        data: One of `NAMES`, or the path of a class-folder tree or an ``.npz`` file.
        root: Folder in which named sets lie.
        size: Side in pixels for pictures from folders.
        download: Fetch a torchvision set that is not there.
        progress: Called after each picture from a folder with its share of all.

    Raises:
        UsageError: If there is no such set, file or folder.
        LabError: If a file is missing or broken.
    """
    name = data.lower()
    if name == "digits":
        return _digits()
    if name.startswith("office31/") and name in NAMES:
        return read_office(Path(root), name.partition("/")[2], size, progress)
    if name in SETS:
        here = Path(root).expanduser()
        folder = SETS[name].folder
        if not download and not (folder and (here / folder).exists()):
            if (here / f"{name}.npz").is_file():
                return read_archive(here / f"{name}.npz", name)
            if (here / name).is_dir():
                return _folder(here / name, size, progress, name)
        return _torchvision(name, root, download)
    path = Path(data).expanduser()
    if path.is_dir():
        return _folder(path.resolve(), size, progress)
    if path.is_file() and path.suffix == ".npz":
        return read_archive(path.resolve())
    if path.exists():
        raise UsageError(
            f"--data: {data} is a file; give the folder with train/ and test/ in it, or an .npz"
            " file."
        )
    nearest = get_close_matches(name, NAMES, n=1)
    if len(path.parts) > 1 and not nearest:
        raise UsageError(f"--data: there is no folder {data}.")
    hint = f"Nearest: {nearest[0]}." if nearest else f"Sets: {', '.join(NAMES)}."
    raise UsageError(f"--data: {data!r} is neither a set nor a folder here. {hint}")


def kept(data: str, root: str, size: int, download: bool) -> PictureSet:
    """Load pictures once for all runs of this process, while they lie unchanged: see `load`."""
    here = Path(root).expanduser()
    places = (Path(data).expanduser(), here / data.lower(), here / f"{data.lower()}.npz")
    stamps = tuple(place.stat().st_mtime_ns if place.exists() else 0 for place in places)
    return _kept(data, str(here.absolute()), size, download, stamps)


@lru_cache(maxsize=2)
def _kept(data: str, root: str, size: int, download: bool, _stamps: tuple[int, ...]) -> PictureSet:
    return load(data, root=root, size=size, download=download)


def _digits() -> PictureSet:
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    pictures = torch.from_numpy(raw.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    # Unshuffled: the second half was written by other people than the first.
    half = len(labels) // 2
    return PictureSet(
        "digits",
        pictures[:half].contiguous(),
        labels[:half],
        pictures[half:].contiguous(),
        labels[half:],
        tuple(str(name) for name in raw.target_names),
        f"scikit-learn's handwritten digits, 8x8, unshuffled: the first {half} to train on, the"
        f" other {len(labels) - half}, by other writers, to test on",
    )


def _torchvision(name: str, root: str, download: bool) -> PictureSet:
    source = SETS[name]
    try:
        from torchvision import datasets

        kind = getattr(datasets, source.kind)
        # Downloads report themselves on standard output, where results belong.
        with redirect_stdout(sys.stderr):
            parts = [
                kind(root=root, download=download, **half) for half in (*source.train, source.test)
            ]
    except Exception as error:
        # Whatever a library's reader comes upon in a broken file.
        if download:
            remedy = "The download failed or a file is broken; delete what is there and try again."
        else:
            remedy = "Name the folder that holds it with --root, or fetch it with --download."
        # What torchvision says here ends with its own call for help, which is not ours.
        words = reason(error).split(" You can use download=True")[0].rstrip(".")
        raise LabError(f"--data: {name} cannot be read from {root}: {words}. {remedy}") from None
    read = [_of_torchvision(part, source) for part in parts]
    pictures = torch.cat([pictures for pictures, _ in read[:-1]]) if len(read) > 2 else read[0][0]
    labels = torch.cat([labels for _, labels in read[:-1]])
    count = int(labels.max()) + 1
    classes = getattr(parts[0], "classes", None) or [str(label) for label in range(count)]
    fine = ", labels of the 100 fine classes" if name == "cifar100" else ""
    return PictureSet(
        name,
        pictures,
        labels,
        *read[-1],
        tuple(classes),
        f"torchvision's {source.kind}, its own halves{fine}"
        + (", extra pictures added to those to train on" if len(source.train) > 1 else ""),
    )


def _of_torchvision(half: Any, source: _Source) -> tuple[Tensor, Tensor]:
    pictures = torch.as_tensor(half.data)
    if pictures.dim() == 3:
        pictures = pictures.unsqueeze(1)
    elif source.channels_last:
        pictures = pictures.permute(0, 3, 1, 2)
    labels = torch.as_tensor(getattr(half, source.labels)).long()
    return pictures.to(torch.uint8).contiguous(), labels


def _folder(
    path: Path, size: int, progress: Callable[[float], None], name: str | None = None
) -> PictureSet:
    tree = read_folder(path, size, progress)
    return PictureSet(
        name or str(path),
        *tree.train,
        *tree.test,
        tree.classes,
        f"pictures in {path}: {tree.train_folder}/ to train on, {tree.test_folder}/ to test on,"
        f" shorter side brought to {size} pixels and cut to a square",
    )
