"""Schemes for residual networks: Fixup, SkipInit and 1/sqrt(L), moved onto the gains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from filterwise.graph import trace
from filterwise.initialize.start import refused

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.graph import Branch
    from filterwise.initialize.start import Layer, Start

__all__ = ["fixup", "last_gains"]


def fixup(start: Start, given: Any) -> None:
    """Scale the gains on each branch by L^(-1/(2m-2)), and by 0 in its last layer."""
    branches = _branches(start, given, "fixup")
    for branch in branches:
        length = len(branch.layers)
        if length == 1:
            raise refused(
                f"the residual branch of {branch.layers[0]} has one weight layer, for which Fixup's"
                " exponent -1/(2m-2) does not exist; use 'skipinit' or 'branch'"
            )
        factor = len(branches) ** (-1.0 / (2 * length - 2))
        for name in branch.layers:
            last = name == branch.layers[-1]
            layer, gain = _with_gain(start, name, "fixup", zero=last)
            start.set(gain, 0.0 if last else layer.first_gain() * factor)
            start.set(layer.bias, 0.0)
            words = "gain 0" if last else f"gain its start times {factor:.4g}"
            start.reasons[layer] = words if layer.bias is None else f"{words}, bias 0"


def last_gains(start: Start, given: Any, scheme: Literal["skipinit", "branch"]) -> None:
    """Scale the gain of each branch's last layer, by 0 or by 1/sqrt(L)."""
    branches = _branches(start, given, scheme)
    skip = scheme == "skipinit"
    factor = 1.0 / math.sqrt(len(branches))
    for branch in branches:
        layer, gain = _with_gain(start, branch.layers[-1], scheme, zero=skip)
        start.set(gain, 0.0 if skip else layer.first_gain() * factor)
        start.reasons[layer] = "gain 0" if skip else f"gain its start times {factor:.4g}"


def _branches(start: Start, given: Any, scheme: str) -> list[Branch]:
    """Return the residual branches, and note how they were found."""
    if not start.converted:
        raise refused(f"no layer is converted, so there is no gain for {scheme!r}; convert_ first")
    flow = trace(start.model, given)
    branches = flow.branches()
    if not branches:
        hint = "; pass input=, a batch" if flow.how == "registration order" else ""
        raise refused(f"no residual branch was found. {flow.sentence.rstrip('.')}{hint}")
    start.notes.append(f"{len(branches)} residual branches. {flow.sentence}")
    start.otherwise = "not set by this scheme"
    names = {name for branch in branches for name in branch.layers}
    behind = sum(flow.normalized(name) for name in names)
    if behind:
        start.notes.append(
            f"A norm stands behind {behind} of the {len(names)} layers on branches; it undoes every"
            " gain but 0."
        )
    return branches


def _with_gain(start: Start, name: str, scheme: str, *, zero: bool) -> tuple[Layer, Tensor]:
    """Return a branch's layer and its gain.

    Raises:
        ConversionError: If it has none, or one that would stay at 0.
    """
    layer = next((layer for layer in start.layers if layer.name == name), None)
    if layer is None or layer.method is None:
        raise refused(
            f"{layer.where if layer else name} lies on a residual branch and has no gain for"
            f" {scheme!r}; unconvert_(model), then convert it, too, with select="
        )
    gain = layer.gain
    if gain is None:
        raise refused(
            f"{layer.where} has no gain, and a normalized weight does not see the scale of its raw"
            f" weight, so {scheme!r} cannot be moved to it; use a method with a gain, such as wa,"
            " pws or ws(affine=true)"
        )
    if zero and not gain.requires_grad:
        raise refused(
            f"{layer.where} has a gain that is not learned, so its branch would stay at 0; use"
            " 'branch'"
        )
    return layer, gain
