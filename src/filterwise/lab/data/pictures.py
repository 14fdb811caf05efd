"""A set of pictures in memory, and its file for several processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from filterwise.lab.errors import LabError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["PictureSet", "load_tensors", "save_tensors"]


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
        domains: More pictures and labels to test on, by name; with any, the test half has the name
            that `origin_domain` says.
        origin_domain: Where training and test half come from, if there are domains.
    """

    name: str
    train_pictures: Tensor
    train_labels: Tensor
    test_pictures: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    origin: str
    sha256: str = ""
    domains: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    origin_domain: str = ""

    def __post_init__(self) -> None:
        """Compute the digest unless it was handed over with the tensors, after a look at labels.

        Raises:
            LabError: If there are more or fewer labels than pictures, or labels without a class.
        """
        _check(self)
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


def _digest(pictures: PictureSet) -> str:
    digest = hashlib.sha256()
    for tensor in (
        *_tensors(pictures).values(),
        *(t for d in pictures.domains.values() for t in d),
    ):
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


def _check(pictures: PictureSet) -> None:
    halves = {
        "training": (pictures.train_pictures, pictures.train_labels),
        "test": (pictures.test_pictures, pictures.test_labels),
        **pictures.domains,
    }
    for half, (samples, labels) in halves.items():
        if len(samples) != len(labels):
            raise LabError(
                f"--data: {pictures.name} has {len(samples)} {half} pictures and {len(labels)}"
                " labels for them; its files do not belong together. Get it again."
            )
        if not len(labels):
            raise LabError(f"--data: {pictures.name} has no {half} pictures. Get it again.")
        for place in ((labels < 0) | (labels >= len(pictures.classes))).nonzero().flatten()[:1]:
            raise LabError(
                f"--data: {pictures.name} is mislabelled: {half} picture {int(place)} (from 0) has"
                f" label {int(labels[place])}, and there are {len(pictures.classes)} classes."
                " Get it again."
            )
