"""Class-folder trees: train/CLASS/picture and test/CLASS/picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch

from filterwise.lab.errors import LabError, UsageError, reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from torch import Tensor
    from torchvision.datasets import ImageFolder

__all__ = ["Tree", "class_folders", "halves", "read_folder", "read_picture", "tensors"]

TEST_FOLDERS = ("test", "val", "valid", "validation")


class Tree(NamedTuple):
    """What a class-folder tree holds; each half is pictures (uint8) and labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    train_folder: str
    test_folder: str


def read_folder(
    path: Path, size: int, progress: Callable[[float], None] = lambda _share: None
) -> Tree:
    """Read every picture of a tree as RGB of one size.

    Args:
        path: Folder with ``train`` and one of ``test``, ``val``, ``valid``, ``validation`` in it.
        size: Side in pixels: the shorter side is brought to it, the middle square is kept.
        progress: Called after each picture with its share of all.

    Raises:
        UsageError: If a folder is missing or a class is empty.
        LabError: If a picture cannot be read.
    """
    train, test = halves(path)
    total = len(train.samples) + len(test.samples)
    return Tree(
        tensors(train, size, lambda: progress(1 / total)),
        tensors(test, size, lambda: progress(1 / total)),
        tuple(train.classes),
        Path(train.root).name,
        Path(test.root).name,
    )


def halves(path: Path) -> tuple[ImageFolder, ImageFolder]:
    """Look through both halves of a tree, without reading pictures.

    Raises:
        UsageError: If a folder is missing, a class is empty, or the halves have other classes.
    """
    train_folder = path / "train"
    if not train_folder.is_dir():
        raise UsageError(
            f"--data: {path} has no folder train. Expected {path.name}/train/CLASS/picture and"
            f" {path.name}/test/CLASS/picture."
        )
    found = [path / name for name in TEST_FOLDERS if (path / name).is_dir()]
    if not found:
        raise UsageError(f"--data: {path} has no folder to test on; add test or val beside train.")
    train, test = class_folders(train_folder), class_folders(found[0])
    if train.classes != test.classes:
        for ours, theirs, folder in ((train, test, found[0]), (test, train, train_folder)):
            missing = [name for name in ours.classes if name not in theirs.classes]
            if missing:
                raise UsageError(
                    f"--data: {folder} has no class {missing[0]}, which the other has."
                )
    return train, test


def class_folders(folder: Path) -> ImageFolder:
    """Look through one half of a tree.

    Raises:
        UsageError: If it has no class folders, or one is empty.
        LabError: If it cannot be read.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        pictures = ImageFolder(str(folder), allow_empty=True)
    except FileNotFoundError:
        loose = next((each for each in folder.iterdir() if each.is_file()), None)
        hint = (
            f" There are files ({loose.name}): sort them into {folder.name}/CLASS/, as the set's"
            " list of labels says."
            if loose
            else ""
        )
        raise UsageError(f"--data: {folder} has no class folders in it.{hint}") from None
    except OSError as error:
        raise LabError(f"--data: {folder} cannot be read: {reason(error)}.") from None
    held = {label for _, label in pictures.samples}
    for label, name in enumerate(pictures.classes):
        if label not in held:
            raise UsageError(
                f"--data: the class folder {folder / name} has no picture in it"
                f" ({', '.join(ending[1:] for ending in IMG_EXTENSIONS)}). Add some or remove it."
            )
    return pictures


def tensors(
    pictures: ImageFolder, size: int, read_one: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Read all pictures of one half: ``(pictures, 3, size, size)`` as bytes, and labels.

    Raises:
        LabError: If a picture cannot be read.
    """
    stack = torch.empty(len(pictures.samples), 3, size, size, dtype=torch.uint8)
    for place, (path, _) in enumerate(pictures.samples):
        square = _fitted(read_picture(path), size)
        stack[place] = torch.from_numpy(numpy.array(square)).permute(2, 0, 1)
        read_one()
    return stack, torch.tensor(pictures.targets)


def _fitted(picture: Image, size: int) -> Image:
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)


def read_picture(path: str) -> Image:
    """Read a picture file as RGB.

    Raises:
        LabError: If it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LabError(
            f"--data: broken picture {path}: {reason(error)}. Replace or remove it."
        ) from None
