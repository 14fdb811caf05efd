"""A job that is written once and run at every optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from filterwise.kernel.cpu.job import KEPT, Column, Job
from filterwise.kernel.cpu.work import Work, addresses_of, columns_of
from filterwise.kernel.function import is_plain
from filterwise.kernel.place import lies_as

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.kernel.family import Gradients, Layer

__all__ = ["Ready", "get_ready"]

# An enumeration's members are slow to look up, and these are looked up for every layer.
OUT, GRADIENT = int(Column.OUT), int(Column.GRADIENT)
TO_GAIN, TO_OFFSET, LENGTH = int(Column.TO_GAIN), int(Column.TO_OFFSET), int(Column.LENGTH)


def get_ready(layers: Sequence[Layer], outs: Sequence[Tensor]) -> Ready | None:
    """Write the jobs of layers down; None where a tensor would have to be copied at every call."""
    for layer, out in zip(layers, outs, strict=True):
        strides = columns_of(layer)[0].strides
        if not lies_as(layer.weight, strides) or not lies_as(out, strides):
            return None
        for numbers in (layer.gain, layer.offset):
            if numbers is not None and not numbers.is_contiguous():
                return None
    return Ready(layers, outs)


class Ready:
    """Forward and backward of layers whose tensors stay where they are."""

    def __init__(self, layers: Sequence[Layer], outs: Sequence[Tensor]) -> None:
        """Write both jobs; only gradients come with each call."""
        self._layers = layers
        self._there, self._back = Work(), Work()
        self._strides, rows = [], []
        for layer, out in zip(layers, outs, strict=True):
            place, columns = columns_of(layer)
            rows.append(self._there.filters)
            self._strides.append(place.strides)
            self._there.add(layer, place, columns, out, out, None, None)
            weight = layer.weight
            self._back.add(layer, place, columns, weight, weight, layer.gain, layer.offset)
        self._table = torch.empty(self._there.filters * KEPT, dtype=torch.float64)
        addresses = addresses_of(self._table, rows)
        self._there.complete(addresses, backward=False)
        self._back.complete(addresses, backward=True)
        self._kept = [(self._table, row) for row in rows]

    def forward(self) -> list[tuple[Tensor, int]]:
        """Write the effective weights; return where each layer's kept numbers are."""
        self._there.run()
        return self._kept

    def backward(
        self, kept: Sequence[tuple[Tensor, int]], gradients: Sequence[Tensor], *, in_place: bool
    ) -> list[Gradients] | None:
        """Return the gradients of all layers; None if these gradients do not fit the job.

        Args:
            kept: What `forward` gave; another kernel may have gone forward in its place.
            gradients: Gradient of each effective weight.
            in_place: Write over them.
        """
        block, at = self._back.block, int(Job.LENGTH)
        done: list[Gradients] = []
        rows = zip(self._layers, self._kept, self._strides, kept, gradients, strict=True)
        for (weight, _, _, gain, offset), own, strides, one, gradient in rows:
            if one is not own or gradient.dtype != weight.dtype or not is_plain(gradient):
                return None
            if gradient.stride() != strides and not lies_as(gradient, strides):
                return None
            to_weight = gradient if in_place else torch.empty_like(weight)
            block[at + OUT], block[at + GRADIENT] = to_weight.data_ptr(), gradient.data_ptr()
            to_gain = to_offset = None
            if gain is not None:
                to_gain = torch.empty_like(gain)
                block[at + TO_GAIN] = to_gain.data_ptr()
            if offset is not None:
                to_offset = torch.empty_like(offset)
                block[at + TO_OFFSET] = to_offset.data_ptr()
            done.append((to_weight, to_gain, to_offset))
            at += LENGTH
        self._back.run()
        return done
