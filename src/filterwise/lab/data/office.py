"""Office-31: the same 31 classes in three domains, to train on one and test on all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from filterwise.lab.data.folder import class_folders, tensors
from filterwise.lab.data.pictures import PictureSet
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.training.seeds import generator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from torchvision.datasets import ImageFolder

__all__ = ["DOMAINS", "read_office"]

DOMAINS = ("amazon", "dslr", "webcam")
HELD_OUT = {("amazon", 2817): 415, ("dslr", 498): 73, ("webcam", 795): 130}
"""Test pictures of a whole domain: every accuracy of WeightAlign's Table VI is a share of these."""
SHARE = 0.15


def read_office(
    root: Path, source: str, size: int, progress: Callable[[float], None]
) -> PictureSet:
    """Read the three domains: one's own part to train on, and a part of each to test on.

    The domains lie in ``office31/amazon``, ``dslr`` and ``webcam`` under the root, with class
    folders in them or in their ``images``. Held out to test on are 415, 73 and 130 pictures of the
    whole domains and 15 % of others, as evenly over the classes as whole numbers allow, drawn once.

    Args:
        root: Where ``office31`` lies.
        source: The domain to train on.
        size: Side in pixels: the shorter side is brought to it, the middle square is kept.
        progress: Called after each picture with its share of all.

    Raises:
        UsageError: If a folder is missing, or domains have other classes.
        LabError: If a picture cannot be read.
    """
    folders = {domain: _domain(root / "office31", domain) for domain in DOMAINS}
    classes = folders[source].classes
    for domain, folder in folders.items():
        for name in sorted(set(classes) ^ set(folder.classes)):
            without = domain if name in classes else source
            raise UsageError(
                f"--data: the domain {without} of Office-31 has no class {name}, which another has"
                f" ({folders[without].root})."
            )
    total = sum(len(folder.samples) for folder in folders.values())
    tests: dict[str, tuple[Tensor, Tensor]] = {}
    train: tuple[Tensor, Tensor] | None = None
    for domain, folder in folders.items():
        pictures, labels = tensors(folder, size, lambda: progress(1 / total))
        held_out = _held_out(domain, labels, len(classes))
        tests[domain] = pictures[held_out], labels[held_out]
        if domain == source:
            train = pictures[~held_out], labels[~held_out]
    if train is None:
        raise LabError(f"Office-31 has no domain {source}.")
    others = {domain: test for domain, test in tests.items() if domain != source}
    counts = ", ".join(f"{domain} {len(test[1])}" for domain, test in tests.items())
    return PictureSet(
        f"office31/{source}",
        *train,
        *tests[source],
        tuple(classes),
        f"Office-31, trained on {source}, tested on a part of each domain held out ({counts}),"
        f" shorter side brought to {size} pixels and cut to a square",
        domains=others,
        origin_domain=source,
    )


def _domain(path: Path, domain: str) -> ImageFolder:
    folder = path / domain
    if not folder.is_dir():
        raise UsageError(
            f"--data: Office-31 needs {folder} (and {', '.join(DOMAINS)} beside each other, with"
            " class folders in them). Name the folder that holds office31 with --root."
        )
    inner = folder / "images"
    return class_folders(inner if inner.is_dir() else folder)


def _held_out(domain: str, labels: Tensor, classes: int) -> Tensor:
    """Draw the test part: quotas by largest remainder, so that the total is met."""
    count = len(labels)
    wanted = HELD_OUT.get((domain, count), round(SHARE * count))
    sizes = torch.bincount(labels, minlength=classes)
    quotas = sizes.double() * wanted / count
    each = quotas.floor().long()
    rest = (quotas - each).argsort(descending=True, stable=True)[: wanted - int(each.sum())]
    each[rest] += 1
    draw = generator("office31", domain)
    held_out = torch.zeros(count, dtype=torch.bool)
    for label in range(classes):
        places = (labels == label).nonzero().flatten()
        chosen = torch.randperm(len(places), generator=draw)[: int(each[label])]
        held_out[places[chosen]] = True
    return held_out
