"""Looking at a model's layers of other libraries, and turning one into a filterwise layer."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise import host
from filterwise.adopt.origin import take_off
from filterwise.filters import CONVOLUTIONS, TRANSPOSED
from filterwise.identify import (
    Bench,
    Probe,
    Subject,
    examine,
    per_channel_difference,
    quiet,
    subject_of,
)
from filterwise.selection import owners_of, read_behind
from filterwise.state import HostState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from filterwise.filters import FilterLayout
    from filterwise.kernel import Kernel
    from filterwise.methods.method import Method

__all__ = ["Candidate", "adopt_layer", "candidates"]

EQUAL = 1e-7
SAME = (
    "it does more to its input than a plain layer does; if it pads by the input's size (SAME),"
    " import timm first, whose Conv2dSame does that, too"
)


@dataclass(frozen=True)
class Candidate:
    """A layer that computes its weight itself, and what it becomes.

    Attributes:
        name: Dotted name.
        module: The layer.
        subject: How it computes its weight.
        method: The method that computes the same; None if there is none.
        layout: Where its filters lie.
        plain: The class that it has without its standardization.
        words: Whose formula it is, or why there is no method.
        is_foreign: Whether it is sure to normalize its weight, by its numbers or by its name.
    """

    name: str
    module: nn.Module
    subject: Subject
    method: Method | None = None
    layout: FilterLayout | None = None
    plain: type[nn.Module] = nn.Module
    words: str = ""
    is_foreign: bool = True


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Look at every layer that may compute its weight itself, each once; nothing is changed."""
    known: list[Candidate] = []
    for name, module in model.named_modules():
        subject = subject_of(module)
        found = subject and _looked_at(Candidate(name, module, subject), known)
        if not found:
            continue
        if found.method is not None:
            known.append(found)
            if reader := read_behind(module, owners_of(model, name)):
                found = replace(found, method=None, words=reader)
        yield found


def _looked_at(one: Candidate, known: Sequence[Candidate]) -> Candidate | None:
    """Return what a layer becomes; None for a plain one."""
    tried = []
    for other in known:
        # What a layer of the same class was is the best guess, and one look confirms it.
        if type(other.module) is type(one.module) and other.method not in tried:
            tried.append(other.method)
            again = replace(other, name=one.name, module=one.module, subject=one.subject)
            if (sure := _confirmed(again)) is not None:
                return sure
    found = examine(one.module, one.subject)
    if found.plain:
        return None
    method, info = (found.match.method, found.match.info) if found.match else (None, None)
    if found.problem or method is None or info is None:
        sure = one.subject.is_known or found.match is not None
        return replace(one, words=found.problem, is_foreign=sure)
    if one.subject.form != "class" and method.has_gain and hasattr(one.module, "gain"):
        return replace(one, words="it already has an attribute gain")
    whose = info.source.partition("; ")[2]
    words = found.match.fault if found.match and found.match.fault else whose or info.title
    again = replace(one, method=method, layout=found.layout, words=words)
    return _confirmed(again) or replace(one, words=SAME)


def _confirmed(one: Candidate) -> Candidate | None:
    """Return it with the class with which an adopted copy computes the same; None if none does."""
    with quiet(one.module):
        for plain in _classes(one):
            found = replace(one, plain=plain)
            if _agrees(found):
                return found
    return None


def _classes(one: Candidate) -> Iterator[type[nn.Module]]:
    cls = type(one.module)
    if one.subject.form == "hook":
        yield cls
    elif one.subject.form == "parametrization":
        yield cls.__bases__[0]
    else:
        kinds = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
        yield from [kind for kind in kinds if isinstance(one.module, kind)]
        layers: Any = sys.modules.get("timm.layers")  # asked for, never imported
        if layers is not None and isinstance(one.module, nn.Conv2d):
            yield layers.Conv2dSame


def _agrees(one: Candidate) -> bool:
    """Tell whether an adopted copy computes the same, on filters and inputs of several sizes."""
    assert one.layout is not None
    axis = -1 if isinstance(one.module, nn.Linear) else 1
    turn, turns = 0, 1
    while turn < turns:
        foreign, ours = (Probe(one.module, one.subject, torch.float64) for _ in range(2))
        bench = Bench(foreign, one.layout)
        if not bench.fits:
            return False
        turns = bench.turns
        for probe in (foreign, ours):
            probe.set(bench.sized(turn), bench.gain, bench.offset if turn else bench.no_offset)
        inputs = foreign.input(), foreign.input(1)
        expected = [foreign.output(x) for x in inputs]
        adopt_layer(replace(one, module=ours.copy), "eager")
        for x, output in zip(inputs, expected, strict=True):
            try:
                found = ours.copy.forward(x)
            except RuntimeError:  # the kernel does not fit into an input that is not padded
                return False
            if per_channel_difference(found, output, axis) > EQUAL:
                return False
        turn += 1
    return True


def adopt_layer(one: Candidate, kernel: Kernel = "auto") -> None:
    """Turn a layer into a filterwise layer, in place; its parameters stay the same objects."""
    assert one.method is not None
    assert one.layout is not None
    origin = take_off(one.module, one.subject, one.plain)
    of_class = one.subject.form == "class"
    state = HostState(
        one.method,
        "weight",
        one.layout,
        str(one.method),
        kernel,
        label=one.name,
        gain=one.subject.gain if of_class else None,
        offset=one.subject.offset,
        origin=origin,
    )
    try:
        host.install_state(one.module, state)
    except BaseException:
        origin.restore(one.module)
        raise
