"""The family kernel on a GPU, in Triton: all layers of a dtype in one launch.

Checked only in Triton's interpreter, on the CPU: no GPU was at hand when it was written. The
programs are in `triton_rows`; here are the table of addresses they read and the launches. A table
is kept on the device as long as the addresses are the same, as they mostly are from step to step;
a new one is copied there in the stream that will read it, and nobody waits for that.
"""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes

from filterwise.filters import FilterLayout
from filterwise.kernel.family import Family, Layer
from filterwise.kernel.place import Place, Targets, empty_like, in_order, place_of
from filterwise.kernel.triton_rows import BLOCK, COLUMNS, KEPT, backward_rows, forward_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.kernel.family import Gradients

__all__ = ["backward", "forward", "prepare", "serves"]

KINDS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


def prepare() -> None:
    """Launch once where there is a GPU: Triton needs a C compiler for it, and may not know it."""
    if not torch.cuda.is_available():
        return
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        weight = torch.zeros(1, 16, device="cuda")
        forward([Layer(weight, Family(), FilterLayout())], [torch.empty_like(weight)])


def serves(layer: Layer) -> bool:
    """Tell whether the kernel can compute a layer: its dtypes, and how its filters lie."""
    weight, _, layout, gain, offset = layer
    if weight.dtype not in KINDS:
        return False
    place = place_of(weight.shape, weight.stride(), layout)
    if place is None:
        return False
    return all(
        values is None
        or (
            values.dtype in KINDS
            and values.numel() == place.filters
            and values.device == weight.device
        )
        for values in (gain, offset)
    )


class _Group(NamedTuple):
    """What layers of one launch have in common."""

    device: torch.device
    weight: torch.dtype
    other: torch.dtype
    gain: torch.dtype | None
    offset: torch.dtype | None
    centre: bool
    raw: bool
    scale: str
    one_run: bool


class _Row(NamedTuple):
    """One layer of a launch: its place in the call, and its row of the table."""

    number: int
    place: Place
    columns: tuple[int, ...]


class _Work:
    """A call while it is written: rows by group, and the tensors that must live until it ran."""

    def __init__(self) -> None:
        self.groups: dict[_Group, list[_Row]] = {}
        self.held: list[Tensor | None] = []
        self.count = 0

    def add(
        self,
        layer: Layer,
        place: Place,
        out: Tensor,
        other: Tensor,
        kept: tuple[Tensor, int] | None,
        to_gain: Tensor | None = None,
        to_offset: Tensor | None = None,
    ) -> None:
        """Enter a layer; `other` is the gradient that comes in, or again `out`."""
        weight = in_order(layer.weight, place.strides)
        gain = None if layer.gain is None else layer.gain.contiguous()
        offset = None if layer.offset is None else layer.offset.contiguous()
        family = layer.family
        group = _Group(
            weight.device,
            weight.dtype,
            other.dtype,
            None if gain is None else gain.dtype,
            None if offset is None else offset.dtype,
            family.centre,
            family.moment == "raw",
            family.scale,
            place.run == place.fan_in,
        )
        kept_at = 0
        if kept is not None:
            table, first = kept
            kept_at = table.data_ptr() + first * KEPT * table.element_size()
        addresses = (
            *(_address(tensor) for tensor in (weight, out, other)),
            kept_at,
            *(_address(tensor) for tensor in (gain, offset, to_gain, to_offset)),
        )
        numbers = _numbers(family, place.fan_in)
        row = _Row(self.count, place, (*addresses, *place[1:], *numbers))
        self.groups.setdefault(group, []).append(row)
        self.held += (weight, out, other, gain, offset, to_gain, to_offset)
        self.count += 1


def forward(layers: Sequence[Layer], outs: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Write effective weights by pointer; return a table of what is kept, and each layer's row."""
    work, targets = _Work(), Targets()
    for layer, out in zip(layers, outs, strict=True):
        place = _place(layer)
        target = targets.effective(out, place)
        work.add(layer, place, target, target, None)
    saved: dict[int, tuple[Tensor, int]] = {}
    for group, rows in work.groups.items():
        filters = sum(row.place.filters for row in rows)
        kept = torch.empty(filters * KEPT, dtype=_sums(group), device=group.device)
        table, layer_of_row, firsts = _table(group, rows, kept)
        saved |= {row.number: (kept, first) for row, first in zip(rows, firsts, strict=True)}
        with _on(group.device):
            _launch(forward_rows, filters)(
                table,
                layer_of_row,
                KINDS[group.weight],
                KINDS[group.other],
                torch.finfo(group.other).max,
                _kind(group.gain),
                _kind(group.offset),
                KINDS[_sums(group)],
                group.centre,
                group.raw,
                group.scale,
                group.one_run,
                BLOCK,
            )
    targets.finish()
    return [saved[index] for index in range(len(layers))]


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
    for layer, kept, gradient in zip(layers, saved, gradients, strict=True):
        place = _place(layer)
        ordered, to_weight, result = targets.gradient(
            layer.weight, gradient, place, in_place=in_place
        )
        to_gain, to_offset = empty_like(layer.gain), empty_like(layer.offset)
        work.add(layer, place, to_weight, ordered, kept, to_gain, to_offset)
        done.append((result, to_gain, to_offset))
    for group, rows in work.groups.items():
        table, layer_of_row, _ = _table(group, rows, None)
        with _on(group.device):
            _launch(backward_rows, layer_of_row.numel())(
                table,
                layer_of_row,
                KINDS[group.weight],
                KINDS[group.other],
                torch.finfo(group.weight).max,
                _kind(group.gain),
                _kind(group.offset),
                _largest(group.gain),
                _largest(group.offset),
                KINDS[_sums(group)],
                group.centre,
                group.raw,
                group.one_run,
                BLOCK,
            )
    targets.finish()
    return done


def _launch(programs: Any, count: int) -> Any:
    return programs[(count,)]


def _place(layer: Layer) -> Place:
    place = place_of(layer.weight.shape, layer.weight.stride(), layer.layout)
    assert place is not None
    return place


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _sums(group: _Group) -> torch.dtype:
    return torch.promote_types(group.weight, torch.float32)


def _kind(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else KINDS[dtype]


def _largest(dtype: torch.dtype | None) -> float:
    return 0.0 if dtype is None else torch.finfo(dtype).max


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache(maxsize=4096)
def _numbers(family: Family, fan_in: int) -> tuple[int, ...]:
    """Return the bits of eps (its root, where f takes that), constant and n / (n - ddof)."""
    eps = family.eps if family.scale == "outside" else math.sqrt(family.eps)
    unbiased = fan_in / (fan_in - 1) if family.ddof else 1.0
    return struct.unpack("3q", struct.pack("3d", eps, family.constant, unbiased))


def _table(
    group: _Group, rows: Sequence[_Row], kept: Tensor | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the table on the device, each row's layer, and each layer's first row."""
    firsts, first = [], 0
    for row in rows:
        firsts.append(first)
        first += row.place.filters
    numbers = []
    place_of_kept = COLUMNS.index("kept") - 1
    for start, row in zip(firsts, rows, strict=True):
        columns = list(row.columns)
        if kept is not None:
            columns[place_of_kept] = kept.data_ptr() + start * KEPT * kept.element_size()
        numbers += (start, *columns)
    stream = _stream(group.device)
    layer_of_row = _layers(tuple(row.place.filters for row in rows), group.device, stream)
    return _on_device(tuple(numbers), group.device, stream), layer_of_row, firsts


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


# A table belongs to the stream that it was copied in: another might read it too early, and its
# memory, once it is let go, serves the same stream again, behind whoever still reads it.


@functools.lru_cache(maxsize=512)
def _on_device(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    del stream
    return _copied(torch.tensor(numbers, dtype=torch.int64), device)


@functools.lru_cache(maxsize=512)
def _layers(filters: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    del stream
    counts = torch.tensor(filters)
    return _copied(torch.repeat_interleave(torch.arange(len(filters)), counts), device)


def _copied(table: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting; torch keeps a pinned source until the copy is done."""
    if device.type != "cuda":
        return table.to(device)
    with _on(device):
        return table.pin_memory().to(device, non_blocking=True)
