"""What a conversion asks a person to look at: sentences for the report, and warnings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from filterwise.host import base_class
from filterwise.methods.weight_standardization import WeightStandardization

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.recipe import Recipe
    from filterwise.selection import WeightLayer

__all__ = ["GUESSED", "scale_lost", "unnormalized"]

GUESSED = (
    "What follows what was guessed from the order of registration: check in this report that the"
    " classifier was left alone, or say select=."
)


def scale_lost(norms: Sequence[str]) -> str:
    """Say that norms are removed which no layer can stand for, though the function is to be kept.

    Args:
        norms: Their names, at least one.
    """
    count = f"{len(norms)} norms are" if len(norms) > 1 else "1 norm is"
    return (
        f"{count} removed whose scale no layer takes over (first: {norms[0]}): select the"
        " layers before them, keep them with exclude=, or give loader= to match the network on"
        " data."
    )


def unnormalized(recipe: Recipe, bare: Sequence[WeightLayer]) -> str:
    """Say that nothing normalizes the output of layers whose method needs it.

    Args:
        recipe: The recipe.
        bare: The layers, at least one.
    """
    method, layer = recipe.method, bare[0]
    grows = ""
    if isinstance(method, WeightStandardization) and method.divide and method.scale == "unit":
        times = math.sqrt(layer.fan_in / 2)
        grows = (
            f' "{method}" gives its weights standard deviation 1, so activations are about'
            f" {times:.0f} times those of a He layer here (square root of half the fan-in,"
            f" {layer.fan_in})."
        )
    advice = f'Leave it out with exclude="{layer.name}", or use "{recipe.norm}+wa"'
    if recipe.norm == "none":
        advice = f'Use Recipe("gn", {type(method).__name__}(...)) or "wa"'
        if method is not None and not method.cells:
            advice = f'Use "gn+{method}", or "wa"'
    return (
        f"nothing normalizes the output of {layer.name or 'the model'}"
        f" ({base_class(layer.module).__name__}, weight {tuple(layer.weight.shape)}).{grows}"
        f" {advice}, whose filters have He's scale. Shown once; check(model) lists"
        f" every such layer ({len(bare)} here)."
    )
