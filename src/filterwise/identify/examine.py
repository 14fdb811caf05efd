"""Looking at one layer: what it computes, and whether a method computes the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from filterwise.identify.constants import same
from filterwise.identify.fit import Fit, eps_in_single, fit
from filterwise.identify.forms import Match, named
from filterwise.identify.probe import Bench, Probe, quiet
from filterwise.methods.method import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from filterwise.filters import FilterLayout
    from filterwise.identify.subject import Subject
    from filterwise.methods.method import Method

__all__ = ["Examined", "examine"]

EQUAL = 1e-7  # some layers hold their eps as a float32, which is that far from what they say
UNKNOWN = "its numbers are those of no published formula"


@dataclass(frozen=True)
class Examined:
    """What probing found of a layer.

    Attributes:
        match: The formula; None if none was recognized.
        layout: Where its filters lie; None without a match.
        plain: Whether the layer just uses its raw weight.
        problem: Why there is no method for it; empty if there is one, or the layer is plain.
    """

    match: Match | None = None
    layout: FilterLayout | None = None
    plain: bool = False
    problem: str = ""


def examine(module: nn.Module, subject: Subject) -> Examined:
    """Probe a copy of a layer; the layer is as it was, whatever its forward does."""
    try:
        with quiet(module):
            return _examined(module, subject)
    except Exception as error:
        first = str(error).split("\n")[0]
        return Examined(
            problem=f"it does not run on a probing input ({type(error).__name__}: {first})"
        )


def _examined(module: nn.Module, subject: Subject) -> Examined:
    if subject.axis == -1:
        return Examined(problem="its norm is the whole weight's, not a filter's (dim=None)")
    weight = subject.raw_weight(module)
    probe = Probe(module, subject, torch.float64)
    found = fit(probe, subject.layouts(module))
    if found is None:
        return Examined(problem=UNKNOWN)
    bare = subject.gain is None and subject.offset is None
    if found.form == "none" and not found.centred:
        # A weight times a number, such as an equalized learning rate's, is not normalized.
        plain = bare and same(found.constant, 1.0)
        return Examined(plain=plain, problem="" if plain else UNKNOWN)
    if weight.dtype == torch.float32:
        eps = eps_in_single(Probe(module, subject, torch.float32), found)
        if eps != found.eps:
            match = _named(replace(found, eps=eps), subject)
            problem = (
                f"its eps depends on the input's dtype ({eps:g} in float32, else {found.eps:g})"
            )
            return Examined(match, found.layout, problem=problem)
    match = _named(found, subject)
    method = match.method
    if method is None:
        return Examined(match, found.layout, problem=match.fault)
    if method.has_gain and subject.gain is None:
        return Examined(match, found.layout, problem="it has no gain")
    if not _agrees(Bench(probe, found.layout), method):
        return Examined(problem=UNKNOWN)
    return Examined(match, found.layout)


def _named(found: Fit, subject: Subject) -> Match:
    return named(found, has_gain=subject.gain is not None, has_offset=subject.offset is not None)


def _agrees(bench: Bench, method: Method) -> bool:
    assert isinstance(method, WeightMethod)
    for turn in range(bench.turns):
        raw = bench.sized(turn)
        found = bench.effective(raw, None)
        if found is None:
            return False
        expected = method.effective(raw, bench.layout, bench.gain, kernel="eager")
        if _worst(bench.layout.matrix(found), bench.layout.matrix(expected)) > EQUAL:
            return False
    return True


def _worst(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two filter matrices, relative filter by filter."""
    gap = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
    return float(gap.max()) if bool(gap.isfinite().all()) else math.inf
