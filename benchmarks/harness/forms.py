"""Weights of many layers, standardized forward and backward, by everybody who can."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import filterwise as fw
from filterwise import kernel
from filterwise.filters import FilterLayout
from filterwise.lab.errors import LabError
from harness.contestants import weight_shapes
from harness.nets import NETS
from harness.peers import FORMS
from harness.timing import clocked, interleaved, ratios, spread, warmed_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from harness.timing import Rounds

__all__ = ["measured", "shapes"]


def shapes(millions: float | None) -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50's converted weights, as many as give so many weights.

    Args:
        millions: Of weights. As many layers of the network are taken as fit, once or several times,
            the large ones at its end first. None is the network once.
    """
    whole = weight_shapes(NETS["resnet50"].build())
    if millions is None:
        return whole
    found: list[tuple[int, ...]] = []
    left, before = 1e6 * millions, math.inf
    while left < before:
        before = left
        for shape in reversed(whole):
            if math.prod(shape) <= left:
                found.append(shape)
                left -= math.prod(shape)
    return found


def measured(
    layers: list[tuple[int, ...]],
    contestants: list[str],
    device: torch.device,
    rounds: Rounds,
    advance: Callable[[float], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return a row for each contestant, forward, backward and both in copies of the round."""
    works = _made(layers, contestants, device)
    _check_agreement(works)
    forward: dict[str, list[float]] = {name: [] for name in works}
    turns = {name: partial(_turn, work, forward[name], device) for name, work in works.items()}
    warmed_up(turns)
    for seconds in forward.values():
        seconds.clear()
    both = interleaved(turns, rounds, advance)
    weights = sum(torch.Size(shape).numel() for shape in layers)
    rows = []
    for name in works:
        backward = [one - other for one, other in zip(both[name], forward[name], strict=True)]
        row: dict[str, Any] = {
            "weights": weights,
            "layers": len(layers),
            "contestant": name,
            "seconds_forward": [round(value, 7) for value in forward[name]],
            "seconds_backward": [round(value, 7) for value in backward],
        }
        for part, times in (
            ("forward", forward[name]),
            ("backward", backward),
            ("both", both[name]),
        ):
            row[f"picoseconds_per_weight_{part}"] = 1e12 * spread(times).median / weights
            row[f"copies_{part}"] = asdict(spread(ratios(times, both["copy"])))
        rows.append(row)
    del works, turns
    gc.collect()
    return rows


def _turn(work: _Work, forward: list[float], device: torch.device) -> float:
    """Run forward and backward; note the forward's seconds and return those of both."""
    first = clocked(work.forward, device)()
    second = clocked(work.backward, device)()
    forward.append(first)
    return first + second


def _check_agreement(works: dict[str, _Work]) -> None:
    """Compare effective weights before any timing: forms differ by eps and divisor alone."""
    reference: torch.Tensor | None = None
    for name, work in works.items():
        if name.startswith("copy"):
            continue
        work.forward()
        found = work.values()[0].detach().double().clone()
        work.backward()
        if reference is None:
            reference = found
        difference = float((found - reference).abs().max() / reference.abs().max())
        if not difference <= 0.02:
            raise LabError(f"{name} computes other weights: they differ by {difference:.3g}.")


class _Work:
    """A forward over all layers, then a backward; each is timed by itself."""

    def __init__(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Keep raw weights, and the gradients of the effective ones."""
        self.weights, self.gradients = weights, gradients

    def forward(self) -> None:
        """Compute all effective weights."""
        raise NotImplementedError

    def backward(self) -> None:
        """Take the gradients to the raw weights."""
        raise NotImplementedError

    def values(self) -> list[Tensor]:
        """Return the effective weights that the last forward computed."""
        raise NotImplementedError


class _Copies(_Work):
    """The unit: one copy of every weight into a tensor that is kept."""

    def __init__(self, weights: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        """Copy `weights` into `kept`."""
        super().__init__(weights, kept)

    def forward(self) -> None:
        """Copy."""
        with torch.no_grad():
            for kept, weight in zip(self.gradients, self.weights, strict=True):
                kept.copy_(weight)

    def backward(self) -> None:
        """Do nothing: one copy is one pass."""


class _Ours(_Work):
    """Filterwise's kernel as `fw.defer` calls it: all layers at once, kept buffers, in place.

    The gradients that come in are written over. Weights are drawn with a standard deviation of 1,
    so that writing the same gradients over again neither grows nor vanishes.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        kept: Sequence[Tensor],
        name: kernel.Kernel,
    ) -> None:
        """Compute into `kept` by the kernel of that name."""
        super().__init__(weights, gradients)
        method, layout = fw.WeightStandardization(), FilterLayout()
        self._layers = [
            kernel.Layer(weight.detach(), method.family(layout.fan_in(weight.shape)), layout)
            for weight in weights
        ]
        self._kept = kept
        self._name: kernel.Kernel = name

    def forward(self) -> None:
        """Compute into the kept tensors."""
        self._saved = kernel.forward(self._layers, self._kept, self._name)

    def backward(self) -> None:
        """Write over the gradients."""
        kernel.backward(self._layers, self._saved, self.gradients, self._name, in_place=True)

    def values(self) -> list[Tensor]:
        """Return the kept tensors."""
        return list(self._kept)


class _Autograd(_Work):
    """One form layer by layer through autograd, with new tensors for what it computes."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        form: Callable[[Tensor], Tensor],
    ) -> None:
        """Compute by a form."""
        super().__init__(weights, gradients)
        self._form = form
        self._hats: list[Tensor] = []

    def forward(self) -> None:
        """Compute with a graph."""
        self._hats = [self._form(weight) for weight in self.weights]

    def backward(self) -> None:
        """Fill ``.grad``, let go of the graph, and drop the gradients as `zero_grad` does."""
        torch.autograd.backward(self._hats, self.gradients)
        self._hats = []
        for weight in self.weights:
            weight.grad = None

    def values(self) -> list[Tensor]:
        """Return what the last forward computed."""
        return self._hats


def _by_layer(weight: Tensor) -> Tensor:
    """Return filterwise's effective weight of one layer, as a bare forward computes it."""
    return fw.functional.weight_standardization(weight)


def _made(
    layers: Sequence[tuple[int, ...]], names: Sequence[str], device: torch.device
) -> dict[str, _Work]:
    """Return who takes part, the copies first; all share weights, gradients and kept tensors."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weights = [nn.Parameter(drawn(shape)) for shape in layers]
    gradients = [drawn(shape) for shape in layers]
    kept = [torch.zeros_like(weight) for weight in weights]
    works: dict[str, _Work] = {
        "copy": _Copies(weights, kept),
        "copy-again": _Copies(weights, kept),
        "kernel": _Ours(weights, gradients, kept, "auto"),
        "kernel-eager": _Ours(weights, gradients, kept, "eager"),
        "by-layer": _Autograd(weights, gradients, _by_layer),
    }
    works |= {name: _Autograd(weights, gradients, form) for name, form in FORMS.items()}
    return {name: works[name] for name in dict.fromkeys(("copy", *names))}
