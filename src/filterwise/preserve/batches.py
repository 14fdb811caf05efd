"""The batches of a loader, as what a model is called with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from filterwise.errors import ConversionError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Arguments", "Batches"]

Arguments = tuple[Any, ...] | Mapping[str, Any]
"""Positional or named arguments of a model."""

FORMS = (
    "a tensor, a tuple or list whose first item is the model's input (labels may follow), or a"
    " mapping of named arguments"
)


class Batches:
    """A loader that is gone through once, its first batch known beforehand.

    Attributes:
        first: What the model is called with on the first batch.
    """

    first: Arguments

    def __init__(self, model: nn.Module, loader: Any) -> None:
        """Take the first batch.

        Raises:
            ConversionError: If it is no loader, is empty, or holds batches of another form.
        """
        if isinstance(loader, torch.Tensor | str | bytes | Mapping):
            more = "; for one batch give [batch]" if isinstance(loader, torch.Tensor) else ""
            raise _refused(f"loader must yield batches, got a {type(loader).__name__}{more}")
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise _refused(f"loader must yield batches, got {type(loader).__name__}")
        devices = {p.device for p in model.parameters()}
        self._device = devices.pop() if len(devices) == 1 else None
        batches = iter(loader)
        try:
            first = next(batches)
        except StopIteration:
            text = "loader is empty (an iterator may be used up); it must yield batches"
            raise _refused(text) from None
        self.first = self._arguments(first, 1)
        self._rest = batches

    def __iter__(self) -> Iterator[Arguments]:
        """Go through all batches; a second time there is none left."""
        rest = (self._arguments(batch, number) for number, batch in enumerate(self._rest, start=2))
        return itertools.chain((self.first,), rest)

    def _arguments(self, batch: Any, number: int) -> Arguments:
        given = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if isinstance(given, tuple | list) and all(isinstance(one, torch.Tensor) for one in given):
            given = (given,)  # a detector's list of pictures
        elif isinstance(given, torch.Tensor):
            given = (given,)
        elif not isinstance(given, Mapping):
            raise _refused(
                f"batch {number} of loader is a {type(batch).__name__} that starts with a"
                f" {type(given).__name__}; it must be {FORMS}"
            )
        if self._device is None:
            return given
        return pytree.tree_map_only(torch.Tensor, lambda one: one.to(self._device), given)


def _refused(text: str) -> ConversionError:
    return ConversionError(f"{text}. The model is unchanged.")
