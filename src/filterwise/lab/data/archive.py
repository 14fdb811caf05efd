"""Pictures in one ``.npz`` file of numpy arrays.

::

    train_images, test_images    (pictures, height, width, channels), uint8
    train_labels, test_labels    (pictures,), whole numbers from 0 on
    class_names                  one string for each label; may be absent
    origin                       one sentence on where they come from; may be absent
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch

from filterwise.lab.data.pictures import PictureSet
from filterwise.lab.errors import LabError, reason

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["read_archive"]

NEEDED = ("train_images", "train_labels", "test_images", "test_labels")


def read_archive(path: Path, name: str | None = None) -> PictureSet:
    """Read a set from an ``.npz`` file.

    Args:
        path: The file.
        name: Of the set; None: the path.

    Raises:
        LabError: If the file is broken, or its arrays are not such a set.
    """
    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as arrays:
            found: dict[str, Any] = {key: arrays[key] for key in arrays.files}
    except Exception as error:
        # Zip, zlib and numpy each have their own words for a truncated file.
        raise LabError(f"--data: {path} cannot be read: {reason(error)}. Make it again.") from None
    missing = [key for key in NEEDED if key not in found]
    if missing:
        raise LabError(
            f"--data: {path} has no array {missing[0]}; it has {', '.join(found) or 'none'}."
        )
    for half in ("train", "test"):
        _check(path, half, found[f"{half}_images"], found[f"{half}_labels"])
    classes = found.get("class_names")
    if classes is None:
        classes = range(int(found["train_labels"].max()) + 1)
    words = found.get("origin")
    return PictureSet(
        name or str(path),
        *_tensors(found, "train"),
        *_tensors(found, "test"),
        tuple(str(each) for each in classes),
        f"arrays of {path.name}" + (f" ({words})" if words is not None else ""),
    )


def _tensors(found: dict[str, Any], half: str) -> tuple[Tensor, Tensor]:
    pictures = torch.from_numpy(found[f"{half}_images"]).permute(0, 3, 1, 2).contiguous()
    return pictures, torch.from_numpy(found[f"{half}_labels"]).long()


def _check(path: Path, half: str, pictures: numpy.ndarray, labels: numpy.ndarray) -> None:
    if pictures.dtype != numpy.uint8 or pictures.ndim != 4 or pictures.shape[3] not in (1, 3):
        raise LabError(
            f"--data: {half}_images of {path} must be uint8 of shape (pictures, height, width, 1 or"
            f" 3), and is {pictures.dtype} of shape {pictures.shape}."
        )
    if not numpy.issubdtype(labels.dtype, numpy.integer) or labels.ndim != 1:
        raise LabError(
            f"--data: {half}_labels of {path} must be whole numbers of shape (pictures,), and is"
            f" {labels.dtype} of shape {labels.shape}."
        )
