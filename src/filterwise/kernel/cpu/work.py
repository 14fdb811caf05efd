"""A call of the compiled kernel: its job while it is written, and the run."""

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
from filterwise.kernel.place import Place, in_order, place_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.filters import FilterLayout
    from filterwise.kernel.family import Family, Layer

__all__ = ["CODES", "Work", "addresses_of", "columns_of", "compiled"]

CODES = {
    torch.float32: SINGLE,
    torch.bfloat16: BFLOAT16,
    torch.float16: HALF,
    torch.float64: DOUBLE,
}
SCALES = {"root": ROOT, "outside": OUTSIDE, "max": MAX, "none": NONE}

GRAIN = 1 << 15
"""Weights in a task: enough that taking one costs nothing, few enough to balance the threads."""


class Work:
    """A job while it is written, and the tensors that must live until it has run.

    Attributes:
        block: The job; a layer's row starts at ``Job.LENGTH + index * Column.LENGTH``.
        filters: Filters of all layers so far.
    """

    __slots__ = ("block", "buffer", "filters", "held", "layers", "weights")

    def __init__(self) -> None:
        """Start with the head alone."""
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

    def complete(self, kept: Sequence[int], *, backward: bool) -> None:
        """Finish the job.

        Args:
            kept: Address of each layer's kept numbers.
            backward: What to compute.
        """
        block = self.block
        block[Column.KEPT + Job.LENGTH :: Column.LENGTH] = array("q", kept)
        block[Job.TASKS], block[Job.LAYERS] = max(1, self.weights // GRAIN), self.layers
        block[Job.BACKWARD], block[Job.WEIGHTS] = backward, self.weights

    def run(self) -> None:
        """Run the job, once more if need be."""
        block = self.block
        threads = min(torch.get_num_threads(), block[Job.TASKS])
        block[Job.TASK] = 0
        if self.buffer:
            # Held by the name until the job has run.
            buffers = torch.empty(threads * self.buffer, dtype=torch.float64)
            block[Job.BUFFERS], block[Job.BUFFER_LENGTH] = buffers.data_ptr(), self.buffer
            block[Job.BUFFERS_TAKEN] = 0
        pool.run(compiled()[0], block.buffer_info()[0], threads)


def addresses_of(table: Tensor, rows: Sequence[int]) -> list[int]:
    """Return the addresses of rows of a table of kept numbers."""
    base = table.data_ptr()
    return [base + row * (KEPT * 8) for row in rows]


def _numbers(values: Tensor | None) -> tuple[int, int, Tensor | None]:
    """Return address and dtype code of a gain or offset, and what must live meanwhile."""
    if values is None:
        return 0, SINGLE, None
    values = values.contiguous()
    return values.data_ptr(), CODES[values.dtype], values


def columns_of(layer: Layer) -> tuple[Place, array[int]]:
    """Return the place, and a layer's row of the job from `Column.FILTERS` on."""
    weight, family, layout, _, _ = layer
    return _columns_of(weight.shape, weight.stride(), layout, family)


@functools.lru_cache(maxsize=4096)
def _columns_of(
    shape: tuple[int, ...], strides: tuple[int, ...], layout: FilterLayout, family: Family
) -> tuple[Place, array[int]]:
    place = place_of(shape, strides, layout)
    assert place is not None
    unbiased = place.fan_in / (place.fan_in - 1) if family.ddof else 1.0
    integers = (*place[1:], family.centre, family.moment == "raw", SCALES[family.scale])
    numbers = struct.pack("3d", family.eps, family.constant, unbiased)
    return place, array("q", integers) + array("q", numbers)


@functools.cache
def compiled() -> tuple[int, object]:
    """Return the compiled function's address, and what must live for it to be valid."""
    from filterwise.kernel.cpu.filters import compile_share

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    sources = int.from_bytes(digest.digest()[:4]) + 1
    try:
        done = compile_share(sources, cache=True)
    except (OSError, RuntimeError):  # numba found no folder that it may write to
        done = compile_share(sources, cache=False)
    return done.address, done
