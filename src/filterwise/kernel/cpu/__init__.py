"""The family kernel on the CPU, compiled by numba: all layers in one call, on torch's threads.

No compiler is needed on the machine. numba is imported, and the code compiled (about 10 seconds,
later read from numba's cache), when the kernel first serves.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from filterwise.kernel.cpu import pool
from filterwise.kernel.cpu.job import (
    BFLOAT16,
    DOUBLE,
    HALF,
    KEPT,
    MAX,
    NONE,
    OUTSIDE,
    ROOT,
    SINGLE,
    Column,
    Job,
)
from filterwise.kernel.place import Place, Targets, empty_like, in_order, place_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.kernel.family import Family, Gradients, Layer

__all__ = ["backward", "forward", "prepare", "serves"]

CODES = {
    torch.float32: SINGLE,
    torch.bfloat16: BFLOAT16,
    torch.float16: HALF,
    torch.float64: DOUBLE,
}
SCALES = {"root": ROOT, "outside": OUTSIDE, "max": MAX, "none": NONE}

GRAIN = 1 << 15
"""Weights in a task: enough that taking one costs nothing, few enough to balance the threads."""


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
    work, targets, kept = _Work(), Targets(), []
    for layer, out in zip(layers, outs, strict=True):
        place, columns = _columns(layer)
        target = targets.effective(out, place)
        kept.append(work.filters)
        work.add(layer, place, columns, target, target, None, None)
    table = torch.empty(work.filters * KEPT, dtype=torch.float64)
    work.run(table.data_ptr(), kept, backward=False)
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
    work, targets = _Work(), Targets()
    done: list[Gradients] = []
    for layer, gradient in zip(layers, gradients, strict=True):
        place, columns = _columns(layer)
        ordered, to_weight, result = targets.gradient(
            layer.weight, gradient, place, in_place=in_place
        )
        to_gain, to_offset = empty_like(layer.gain), empty_like(layer.offset)
        work.add(layer, place, columns, to_weight, ordered, to_gain, to_offset)
        done.append((result, to_gain, to_offset))
    work.run(0, [kept.data_ptr() + row * KEPT * 8 for kept, row in saved], backward=True)
    targets.finish()
    return done


class _Work:
    """A job while it is written, and the tensors that must live until it has run."""

    __slots__ = ("block", "buffer", "filters", "held", "layers", "weights")

    def __init__(self) -> None:
        self.layers = self.filters = self.weights = self.buffer = 0
        self.block = array("q", bytes(8 * Job.LENGTH))
        self.held: list[Tensor | None] = []

    def add(
        self,
        layer: Layer,
        place: Place,
        columns: array[int],
        out: Tensor,
        other: Tensor,
        to_gain: Tensor | None,
        to_offset: Tensor | None,
    ) -> None:
        """Enter a layer.

        Args:
            layer: The layer.
            place: Where its filters lie.
            columns: What does not change from call to call, from `Column.FILTERS` on.
            out: Where the result goes, lying as `place` says.
            other: The gradient that comes in; without one, again `out`.
            to_gain: Where the gain's gradient goes.
            to_offset: Where the offset's gradient goes.
        """
        weight, _, _, gain, offset = layer
        weight = in_order(weight, place.strides)
        kind, out_kind, other_kind = CODES[weight.dtype], CODES[out.dtype], CODES[other.dtype]
        if kind != SINGLE or out_kind == DOUBLE or other_kind == DOUBLE:
            self.buffer = max(self.buffer, 2 * place.fan_in)
        gain_at, gain_kind, gain = _numbers(gain)
        offset_at, offset_kind, offset = _numbers(offset)
        self.block.extend(
            (
                self.weights,
                weight.data_ptr(),
                out.data_ptr(),
                other.data_ptr(),
                0,
                gain_at,
                offset_at,
                0 if to_gain is None else to_gain.data_ptr(),
                0 if to_offset is None else to_offset.data_ptr(),
                kind,
                out_kind,
                other_kind,
                gain_kind,
                offset_kind,
            )
        )
        self.block.extend(columns)
        self.held += (weight, out, other, gain, offset)
        self.layers += 1
        self.filters += place.filters
        self.weights += place.filters * place.fan_in

    def run(self, base: int, kept: Sequence[int], *, backward: bool) -> None:
        """Run the job.

        Args:
            base: Address of the table of kept numbers, or 0.
            kept: Each layer's first row there, or with a base of 0 that row's address.
            backward: What to compute.
        """
        block = self.block
        place = Job.LENGTH + Column.KEPT
        for row in kept:
            block[place] = base + row * (KEPT * 8) if base else row
            place += Column.LENGTH
        tasks = max(1, self.weights // GRAIN)
        threads = min(torch.get_num_threads(), tasks)
        block[Job.TASKS], block[Job.LAYERS] = tasks, self.layers
        block[Job.BACKWARD], block[Job.WEIGHTS] = backward, self.weights
        if self.buffer:
            buffers = torch.empty(threads * self.buffer, dtype=torch.float64)
            block[Job.BUFFERS], block[Job.BUFFER_LENGTH] = buffers.data_ptr(), self.buffer
            self.held.append(buffers)
        pool.run(_compiled()[0], block.buffer_info()[0], threads)


def _numbers(values: Tensor | None) -> tuple[int, int, Tensor | None]:
    """Return address and dtype code of a gain or offset, and what must live meanwhile."""
    if values is None:
        return 0, SINGLE, None
    values = values.contiguous()
    return values.data_ptr(), CODES[values.dtype], values


def _columns(layer: Layer) -> tuple[Place, array[int]]:
    weight, family, layout, _, _ = layer
    return _columns_of(weight.shape, weight.stride(), layout, family)


@functools.lru_cache(maxsize=4096)
def _columns_of(
    shape: tuple[int, ...], strides: tuple[int, ...], layout: FilterLayout, family: Family
) -> tuple[Place, array[int]]:
    """Return the place, and a layer's row of the job from `Column.FILTERS` on."""
    place = place_of(shape, strides, layout)
    assert place is not None
    unbiased = place.fan_in / (place.fan_in - 1) if family.ddof else 1.0
    integers = (*place[1:], family.centre, family.moment == "raw", SCALES[family.scale])
    numbers = struct.pack("3d", family.eps, family.constant, unbiased)
    return place, array("q", integers) + array("q", numbers)


def prepare() -> None:
    """Compile, or read from numba's cache, what the first call would otherwise wait for."""
    _compiled()


@functools.cache
def _compiled() -> tuple[int, object]:
    """Return the compiled function's address, and what must live for it to be valid."""
    from filterwise.kernel.cpu.filters import compile_share

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    sources = int.from_bytes(digest.digest()[:4]) + 1
    try:
        compiled = compile_share(sources, cache=True)
    except (OSError, RuntimeError):  # numba found no folder that it may write to
        compiled = compile_share(sources, cache=False)
    return compiled.address, compiled
