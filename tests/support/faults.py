"""Faults of converted layers, for the laws on hosts.

Each is a context in which one thing of filterwise is wrong; `tests/laws/test_meta.py` runs the laws
in it. (Faulty kernels, for the laws on filter matrices, are in `mutants`; faults of what is done to
a whole model in `model_faults`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from filterwise import host
from filterwise.filters import FilterLayout
from filterwise.methods.method import WeightMethod

FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {}


def fault(function: Callable[[], Iterator[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Enter a fault under its name."""
    made = contextmanager(function)
    FAULTS[function.__name__] = made
    return made


def _spoilt(change: Callable[[Tensor, Tensor], Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which ``change(raw weight, effective weight)`` is what comes out."""
    right = WeightMethod.effective

    def wrong(self: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return change(weight, right(self, weight, *args, **kwargs))

    return patch.object(WeightMethod, "effective", wrong)


def _layout(layout: FilterLayout) -> AbstractContextManager[Any]:
    return patch.object(host, "layout_of", lambda *_: layout)


@fault
def always_contiguous():
    """Brings the effective weight into the default order."""
    with _spoilt(lambda _, out: out.contiguous()):
        yield


@fault
def storage_order():
    """Reads a weight in the order in which it is stored."""
    with _spoilt(lambda raw, out: out if raw.is_contiguous() else out * 1.01):
        yield


@fault
def ungrouped_transposed():
    """Reads a grouped transposed weight as if it had one group."""
    with _layout(FilterLayout(axis=1, groups=1)):
        yield


@fault
def axis_0():
    """Reads a transposed weight along its input axis."""
    with _layout(FilterLayout()):
        yield


@fault
def always_float32():
    """Leaves the effective weight in the dtype of the statistics."""
    with _spoilt(lambda _, out: out.float()):
        yield


@fault
def on_the_cpu():
    """Makes the effective weight on the default device."""
    with _spoilt(lambda raw, out: torch.zeros(raw.shape, dtype=out.dtype)):
        yield


@fault
def half_under_autocast():
    """Rounds the effective weight to half precision wherever autocast is on."""
    with _spoilt(
        lambda _, out: out.bfloat16().float() if torch.is_autocast_enabled("cpu") else out
    ):
        yield


@fault
def centres_in_place():
    """Writes into the raw weight."""

    def change(raw: Tensor, out: Tensor) -> Tensor:
        with torch.no_grad():
            raw.mul_(1.0)
        return out

    with _spoilt(change):
        yield


@fault
def noisy():
    """Draws a random number."""
    with _spoilt(lambda _, out: out * (1 + 1e-7 * torch.rand(()))):
        yield


@fault
def reads_mode():
    """Computes something else in training."""
    right = host.effective_weight

    def wrong(module: Any, input: Any = None) -> Tensor:
        return right(module, input) * (1.5 if module.training else 1.0)

    with patch.object(host, "effective_weight", wrong):
        yield


@fault
def reads_the_input():
    """Lets the input into the effective weight."""
    right = host.effective_weight

    def wrong(module: Any, input: Any = None, dtype: Any = None) -> Tensor:
        out = right(module, input, dtype)
        return out if input is None else out * (1.0 + 1e-6 * input.mean())

    with patch.object(host, "effective_weight", wrong):
        yield


@fault
def reads_the_batch():
    """Lets the size of the batch into the effective weight."""
    right = host.effective_weight

    def wrong(module: Any, input: Any = None, dtype: Any = None) -> Tensor:
        out = right(module, input, dtype)
        return out if input is None else out * (1.0 + 1e-2 * input.shape[0])

    with patch.object(host, "effective_weight", wrong):
        yield


@fault
def breaks_the_graph():
    """Reads a number back from the weight."""
    with _spoilt(lambda raw, out: out * (1.0 if raw.sum().item() else 2.0)):
        yield


@fault
def recompiles():
    """Puts a number that changes with every call into the graph."""
    calls = []

    def change(_: Tensor, out: Tensor) -> Tensor:
        calls.append(1)
        return out * (1.0 + 0.0 * len(calls))

    with _spoilt(change):
        yield
