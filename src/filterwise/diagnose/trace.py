"""What a recorder has recorded, as plain records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

__all__ = ["Found", "Trace", "as_records"]

Found = tuple[str, str, "Tensor"]
"""Layer, signal and value."""


class _Block(NamedTuple):
    """All values of one step, in one tensor on the CPU."""

    step: int
    rows: list[tuple[str, str, torch.Size]]
    values: Tensor


def _packed(step: int, found: Sequence[Found]) -> _Block:
    """Bring all values of a step over in one transfer: a device would wait for every single one."""
    rows = [(layer, signal, value.shape) for layer, signal, value in found]
    flat = [value.flatten() for _, _, value in found]
    if flat:
        wide = torch.float32 if flat[0].device.type == "mps" else torch.float64
        values = torch.cat([one.to(wide) for one in flat]).cpu()
    else:
        values = torch.empty(0)
    return _Block(step, rows, values)


def _unpacked(block: _Block) -> Iterable[dict[str, Any]]:
    start = 0
    for layer, signal, shape in block.rows:
        value = block.values[start : start + shape.numel()].view(shape)
        start += shape.numel()
        yield {"step": block.step, "layer": layer, "signal": signal, "value": value.tolist()}


def as_records(found: Sequence[Found], step: int = 0) -> list[dict[str, Any]]:
    """Return values as records."""
    return list(_unpacked(_packed(step, found)))


class Trace:
    """What was recorded.

    Attributes:
        notes: Sentences on what could not be recorded, and why.
    """

    def __init__(self, close: Callable[[float | None], None]) -> None:
        """Be empty; `close` closes a step by hand."""
        self.notes: list[str] = []
        self._blocks: list[_Block] = []
        self._close: Callable[[float | None], None] | None = close

    def step(self, lr: float | None = None) -> None:
        """Close a step by hand, where no torch optimizer takes it.

        For loops that compute gradients without an update, or update in their own way. Signals are
        computed from the weights as they are now, from ``.grad`` and from the forwards since the
        step before.

        Args:
            lr: Learning rate for the signals that need one.

        Raises:
            DeferralError: If the gradients of deferred micro-batches are not handed over yet: what
                lies in ``.grad`` is then the gradient of the effective weight.
            RuntimeError: If recording has ended.
        """
        if self._close is None:
            raise RuntimeError("recording has ended; Trace.step closes steps inside the context")
        self._close(lr)

    def end(self) -> None:
        """Let go of the recorder, and so of the model."""
        self._close = None

    def add(self, step: int, found: Sequence[Found]) -> None:
        """Take in the values of a step."""
        self._blocks.append(_packed(step, found))

    def note(self, sentence: str) -> None:
        """Take in a sentence, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def records(
        self, signal: str | None = None, layer: str | None = None, step: int | None = None
    ) -> list[dict[str, Any]]:
        """Return what was recorded, in the order of steps, layers and signals.

        Args:
            signal: Only this signal.
            layer: Only the layer of this dotted name.
            step: Only this step; steps count from 0, those that were left out too.

        Returns:
            Dicts with ``step``, ``layer``, ``signal`` and ``value``: a number, a list with one for
            each filter or channel, or for histograms a list of lists (low, high and 64 counts).
        """
        return [
            record
            for block in self._blocks
            if step is None or block.step == step
            for record in _unpacked(block)
            if signal in (None, record["signal"]) and layer in (None, record["layer"])
        ]

    def latest(self) -> list[dict[str, Any]]:
        """Return the records of the last recorded step; an empty list before the first."""
        return list(_unpacked(self._blocks[-1])) if self._blocks else []

    def steps(self) -> list[int]:
        """Return which steps were recorded."""
        return [block.step for block in self._blocks]
