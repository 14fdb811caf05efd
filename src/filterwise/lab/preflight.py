"""What can be known before anything is trained: device, networks, recipes that do not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import filterwise as fw
from filterwise.lab.engine import Batches
from filterwise.lab.errors import UsageError, reason
from filterwise.lab.nets import build

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from filterwise.lab.data import PictureSet

__all__ = ["check_device", "try_out"]


def check_device(device: str) -> None:
    """See that tensors can be put on a device.

    Raises:
        UsageError: If they cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        words = reason(error).split(". ")[0].rstrip(".")
        raise UsageError(f"--device: {device!r} cannot be used here: {words}.") from None


def try_out(nets: Sequence[str], recipes: Sequence[str], data: PictureSet) -> list[str]:
    """Build every network once under every recipe and show it two pictures.

    Returns:
        Sentences on recipes whose method needs a norm that the recipe takes away.

    Raises:
        UsageError: If a network is not there, a recipe does not fit it, or it cannot take pictures
            of this shape.
    """
    pictures, _ = next(Batches(data, 2, 0, torch.device("cpu")).epoch())
    return [
        sentence
        for net in nets
        for recipe in recipes
        for sentence in _try_one(net, recipe, data, pictures)
    ]


def _try_one(net: str, recipe: str, data: PictureSet, pictures: torch.Tensor) -> Iterator[str]:
    try:
        model, report = build(net, recipe, data.channels, len(data.classes))
        with torch.no_grad():
            model.eval()(pictures)
    except fw.ConversionError as error:
        words = reason(error).removesuffix(" The model is unchanged.")
        raise UsageError(f"--recipes: {recipe} does not fit the {net} net: {words}") from None
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        shape = "x".join(str(side) for side in pictures.shape[1:])
        raise UsageError(
            f"--net: {net} cannot take pictures of {shape}: {reason(error)}."
        ) from None
    parsed = fw.Recipe.parse(recipe)
    if parsed.method is not None and parsed.method.needs_norm and parsed.norm == "none":
        yield (
            f"{recipe} on the {net} net: {parsed.method.title} needs an activation norm behind it,"
            f" and {recipe!r} alone means none ({len(report.converted)} layers)."
        )
