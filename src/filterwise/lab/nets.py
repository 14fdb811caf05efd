"""Networks by name, and their conversion by recipe."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import filterwise as fw
from filterwise.lab.architectures import ARCHITECTURES, NARROWED
from filterwise.lab.errors import UsageError
from filterwise.lab.models import named_model
from filterwise.lab.settings import needs_branch_gains

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build", "convert", "first_gains", "make"]


def make(net: str, channels: int, classes: int, width: float = 1.0) -> nn.Module:
    """Build a network of the lab, of torchvision or of timm, not converted.

    Draws its first weights from torch's global generator.

    Args:
        net: Its name.
        channels: Of the pictures.
        classes: Number of logits.
        width: Share of its planes.

    Raises:
        UsageError: If there is no such network, or it cannot be had with fewer planes.
        LabError: If it cannot be built.
    """
    if net in ARCHITECTURES:
        return ARCHITECTURES[net](channels, classes, width)
    if width == 1:
        return named_model(net, channels, classes)
    if net in NARROWED:
        return NARROWED[net](channels, classes, width)
    named_model(net, channels, classes)
    known = ", ".join([*ARCHITECTURES, *NARROWED])
    raise UsageError(f"width: {net} is there with all its planes only. With a share: {known}.")


def convert(model: nn.Module, recipe: str | fw.Recipe, **options: Any) -> fw.Report:
    """Convert a network as `fw.convert_` does, in silence and without the norms that are its own.

    Raises:
        ConversionError: If the recipe does not fit it.
    """
    own = [*getattr(model, "own_norms", ())]
    if own:
        options["exclude"] = [*(options.get("exclude") or ()), *own]
    with warnings.catch_warnings():
        # The report carries the same sentences; a comparison is where people try what warns.
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        return fw.convert_(model, recipe, **options)


def build(
    net: str, recipe: str, channels: int, classes: int, width: float = 1.0
) -> tuple[nn.Module, fw.Report]:
    """Build a network and convert it by a recipe, with the first gains that it needs.

    Under one seed every recipe starts from the same raw weights.

    Returns:
        The network, in training mode, and the report of its conversion.

    Raises:
        UsageError: If there is no such network.
        ConversionError: If the recipe does not fit it.
    """
    model = make(net, channels, classes, width)
    report = convert(model, recipe)
    first_gains(model, net, recipe)
    return model.train(), report


def first_gains(model: nn.Module, net: str, recipe: str) -> None:
    """Give a converted network the start that belongs to it: Fixup's, or 1/sqrt(L) on branches."""
    start = getattr(model, "start", None)
    if net in ARCHITECTURES and start is not None:
        start()
    if needs_branch_gains(net, recipe):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            fw.initialize_(model, "branch")
