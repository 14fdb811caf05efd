"""The family kernel on the CPU, compiled by numba: all layers in one call, on torch's threads.

No compiler is needed on the machine. numba is imported, and the code compiled (about 10 seconds,
later read from numba's cache), when the kernel first serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from filterwise.kernel.cpu.job import KEPT
from filterwise.kernel.cpu.ready import get_ready
from filterwise.kernel.cpu.work import CODES, Work, addresses_of, columns_of, compiled
from filterwise.kernel.place import Place, Targets, empty_like, place_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.kernel.family import Gradients, Layer

__all__ = ["backward", "forward", "get_ready", "prepare", "serves"]


def serves(layer: Layer) -> bool:
    """Tell whether the kernel can compute a layer: its dtypes, and how its filters lie."""
    weight, _, layout, gain, offset = layer
    if weight.dtype not in CODES:
        return False
    place = place_of(weight.shape, weight.stride(), layout)
    if place is None:
        return False
    return (gain is None or _fits(gain, place)) and (offset is None or _fits(offset, place))


def _fits(values: Tensor, place: Place) -> bool:
    return values.dtype in CODES and values.numel() == place.filters and values.is_cpu


def forward(layers: Sequence[Layer], outs: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Write effective weights by pointer; return a table of what is kept, and each layer's row."""
    work, targets, kept = Work(), Targets(), []
    for layer, out in zip(layers, outs, strict=True):
        place, columns = columns_of(layer)
        target = targets.effective(out, place)
        kept.append(work.filters)
        work.add(layer, place, columns, target, target, None, None)
    table = torch.empty(work.filters * KEPT, dtype=torch.float64)
    work.complete(addresses_of(table, kept), backward=False)
    work.run()
    targets.finish()
    return [(table, row) for row in kept]


def backward(
    layers: Sequence[Layer],
    saved: Sequence[tuple[Tensor, int]],
    gradients: Sequence[Tensor],
    *,
    in_place: bool,
) -> list[Gradients]:
    """Return the gradients of every layer (see `filterwise.kernel`)."""
    work, targets = Work(), Targets()
    done: list[Gradients] = []
    for layer, gradient in zip(layers, gradients, strict=True):
        place, columns = columns_of(layer)
        ordered, to_weight, result = targets.gradient(
            layer.weight, gradient, place, in_place=in_place
        )
        to_gain, to_offset = empty_like(layer.gain), empty_like(layer.offset)
        work.add(layer, place, columns, to_weight, ordered, to_gain, to_offset)
        done.append((result, to_gain, to_offset))
    work.complete([addresses_of(kept, [row])[0] for kept, row in saved], backward=True)
    work.run()
    targets.finish()
    return done


def prepare() -> None:
    """Compile, or read from numba's cache, what the first call would otherwise wait for."""
    compiled()
