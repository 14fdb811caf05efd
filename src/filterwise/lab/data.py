"""What is learned from: a set of pictures in two halves, as tensors."""

from __future__ import annotations

import hashlib
import pickle
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from filterwise.lab.errors import LabError, UsageError, reason
from filterwise.lab.folder import read_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["SETS", "PictureSet", "load", "load_tensors", "save_tensors"]


@dataclass(frozen=True)
class PictureSet:
    """Pictures and labels to train on, and others to test on.

    Attributes:
        name: As in tables: ``digits``, a torchvision name, or a folder's absolute path.
        train_pictures: ``(pictures, channels, height, width)``, uint8.
        train_labels: ``(pictures,)``, int64, from 0 on.
        test_pictures: Like `train_pictures`.
        test_labels: Like `train_labels`.
        classes: Name of each label.
        origin: One sentence on where it comes from and how it was divided.
        sha256: Digest of all pictures and labels.
    """

    name: str
    train_pictures: Tensor
    train_labels: Tensor
    test_pictures: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    origin: str
    sha256: str = ""

    def __post_init__(self) -> None:
        """Compute the digest unless it was handed over with the tensors."""
        if not self.sha256:
            object.__setattr__(self, "sha256", _digest(self))

    @property
    def channels(self) -> int:
        """Channels of a picture: 1 or 3."""
        return self.train_pictures.shape[1]

    @property
    def chance(self) -> float:
        """Error of answering the commonest class of the test pictures every time, from 0 to 1."""
        counts = torch.bincount(self.test_labels, minlength=len(self.classes))
        return 1.0 - int(counts.max()) / len(self.test_labels)

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel over the training pictures.

        Both have shape ``(1, channels, 1, 1)``; a channel that never changes gets deviation 1.
        """
        levels = torch.arange(256, dtype=torch.float64)
        means, deviations = [], []
        for channel in range(self.channels):
            # A histogram is exact and needs no copy of the pictures in floating point.
            counts = torch.bincount(self.train_pictures[:, channel].flatten(), minlength=256)
            weights = counts.double() / counts.sum()
            mean = (weights * levels).sum()
            deviation = (weights * (levels - mean) ** 2).sum().sqrt()
            means.append(mean)
            deviations.append(deviation if deviation > 0 else torch.ones_like(deviation))
        shape = (1, self.channels, 1, 1)
        return (
            torch.stack(means).float().view(shape),
            torch.stack(deviations).float().view(shape),
        )


class _Source(NamedTuple):
    """How one of torchvision's sets is opened, and where it keeps its pictures."""

    kind: str
    halves: tuple[dict[str, Any], dict[str, Any]]
    labels: str = "targets"
    channels_last: bool = False


_BY_TRAIN = ({"train": True}, {"train": False})
SETS = {
    "cifar10": _Source("CIFAR10", _BY_TRAIN, channels_last=True),
    "cifar100": _Source("CIFAR100", _BY_TRAIN, channels_last=True),
    "fashionmnist": _Source("FashionMNIST", _BY_TRAIN),
    "kmnist": _Source("KMNIST", _BY_TRAIN),
    "mnist": _Source("MNIST", _BY_TRAIN),
    "svhn": _Source("SVHN", ({"split": "train"}, {"split": "test"}), labels="labels"),
    "usps": _Source("USPS", _BY_TRAIN),
}
"""Torchvision's sets of small pictures, by the name that ``--data`` takes."""


def load(
    data: str,
    *,
    root: str = "data",
    size: int = 32,
    download: bool = False,
    progress: Callable[[float], None] = lambda _share: None,
) -> PictureSet:
    """Load pictures by name or from a folder.

    Args:
        data: ``digits``, a key of `SETS`, or the path of a class-folder tree.
        root: Folder in which torchvision's sets lie.
        size: Side in pixels for pictures from a class-folder tree.
        download: Fetch a torchvision set that is not there.
        progress: Called after each picture of a class-folder tree with its share of all.

    Raises:
        UsageError: If there is no such set or folder.
        LabError: If a file is missing or broken.
    """
    name = data.lower()
    if name == "digits":
        return _digits()
    if name in SETS:
        return _torchvision(name, root, download)
    path = Path(data).expanduser()
    if path.is_dir():
        return _folder(path.resolve(), size, progress)
    known = ["digits", *SETS]
    if path.exists():
        raise UsageError(f"--data: {data} is a file; give the folder with train/ and test/ in it.")
    if len(path.parts) > 1:
        raise UsageError(f"--data: there is no folder {data}.")
    nearest = get_close_matches(name, known, n=1)
    hint = f"Nearest: {nearest[0]}." if nearest else f"Sets: {', '.join(known)}."
    raise UsageError(f"--data: {data!r} is neither a set nor a folder here. {hint}")


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
            halves = [kind(root=root, download=download, **half) for half in source.halves]
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.PickleError) as error:
        if download:
            remedy = "The download failed or a file is broken; delete what is there and try again."
        else:
            remedy = "Name the folder that holds it with --root, or fetch it with --download."
        # What torchvision says here ends with its own call for help, which is not ours.
        words = reason(error).split(" You can use download=True")[0].rstrip(".")
        raise LabError(f"--data: {name} cannot be read from {root}: {words}. {remedy}") from None
    (train_pictures, train_labels), (test_pictures, test_labels) = (
        _of_torchvision(half, source) for half in halves
    )
    count = int(train_labels.max()) + 1
    classes = getattr(halves[0], "classes", None) or [str(label) for label in range(count)]
    return PictureSet(
        name,
        train_pictures,
        train_labels,
        test_pictures,
        test_labels,
        tuple(classes),
        f"torchvision's {source.kind}, its own halves",
    )


def _of_torchvision(half: Any, source: _Source) -> tuple[Tensor, Tensor]:
    pictures = torch.as_tensor(half.data)
    if pictures.dim() == 3:
        pictures = pictures.unsqueeze(1)
    elif source.channels_last:
        pictures = pictures.permute(0, 3, 1, 2)
    labels = torch.as_tensor(getattr(half, source.labels)).long()
    return pictures.to(torch.uint8).contiguous(), labels


def _folder(path: Path, size: int, progress: Callable[[float], None]) -> PictureSet:
    tree = read_folder(path, size, progress)
    train_pictures, train_labels = tree.train
    test_pictures, test_labels = tree.test
    return PictureSet(
        str(path),
        train_pictures,
        train_labels,
        test_pictures,
        test_labels,
        tree.classes,
        f"pictures in {path}: {tree.train_folder}/ to train on, {tree.test_folder}/ to test on,"
        f" shorter side brought to {size} pixels and cut to a square",
    )


def _digest(pictures: PictureSet) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(pictures).values():
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _tensors(pictures: PictureSet) -> dict[str, Tensor]:
    names = ("train_pictures", "train_labels", "test_pictures", "test_labels")
    return {name: getattr(pictures, name) for name in names}


def save_tensors(pictures: PictureSet, path: Path) -> None:
    """Write a set to a file from which several processes can read it, sharing memory."""
    words = {
        "name": pictures.name,
        "classes": list(pictures.classes),
        "origin": pictures.origin,
        "sha256": pictures.sha256,
    }
    torch.save({"words": words, "tensors": _tensors(pictures)}, path)


def load_tensors(path: Path) -> PictureSet:
    """Read what `save_tensors` wrote; the pictures stay in the file until they are used."""
    stored = torch.load(path, mmap=True, weights_only=True)
    words = stored["words"]
    return PictureSet(**{**words, "classes": tuple(words["classes"])}, **stored["tensors"])
