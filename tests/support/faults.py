"""Faults of converted layers and of what is done to models, for the laws that need a whole model.

Each is a context in which one thing of filterwise is wrong; `tests/laws/test_meta.py` runs the laws
in it. (Faulty kernels, for the laws on filter matrices, are in `mutants`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import filterwise as fw
from filterwise import checkpoint, convert, host
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


def _after_conversion(spoil: Callable[[Any], None]) -> AbstractContextManager[Any]:
    """Return a context in which `convert_` does something to the model at its end."""
    right = fw.convert_

    def wrong(model: Any, *args: Any, **kwargs: Any) -> Any:
        report = right(model, *args, **kwargs)
        spoil(model)
        return report

    return patch.object(fw, "convert_", wrong)


@fault
def replaces_parameters():
    """Gives converted layers new Parameter objects, which an older optimizer does not know."""

    def spoil(model: Any) -> None:
        for _, layer in host.converted(model):
            layer._parameters["weight"] = nn.Parameter(layer.weight.detach().clone())

    with _after_conversion(spoil):
        yield


@fault
def draws_at_conversion():
    """Draws a random number while converting."""
    with _after_conversion(lambda _: torch.rand(())):
        yield


@fault
def thaws_gains():
    """Gives a frozen layer a gain that learns."""

    def spoil(model: Any) -> None:
        for _, layer in host.converted(model):
            layer.gain.requires_grad_()

    with _after_conversion(spoil):
        yield


@fault
def loses_hooks():
    """Rebuilds layers without what was registered on them."""

    def spoil(model: Any) -> None:
        for _, layer in host.converted(model):
            layer._forward_hooks.clear()

    with _after_conversion(spoil):
        yield


@fault
def keeps_gains():
    """Leaves gains behind when a model is unconverted."""
    right = host.uninstall

    def wrong(layer: Any) -> None:
        gain = layer.gain
        right(layer)
        layer.gain = gain

    with patch.object(host, "uninstall", wrong):
        yield


@fault
def folds_on_the_way_back():
    """Writes the effective weight into the raw one when a model is unconverted."""
    right = host.uninstall

    def wrong(layer: Any) -> None:
        with torch.no_grad():
            layer.weight.copy_(host.effective_weight(layer))
        right(layer)

    with patch.object(host, "uninstall", wrong):
        yield


@fault
def stops_half_way():
    """Converts layer by layer and keeps what it has when one fails."""

    @contextmanager
    def no_way_back():
        yield []

    with patch.object(convert, "_all_or_nothing", no_way_back):
        yield


def _after_folding(spoil: Callable[[Any, Any], Any]) -> AbstractContextManager[Any]:
    right = fw.fold

    def wrong(model: Any, **options: Any) -> Any:
        return spoil(model, right(model, **options))

    return patch.object(fw, "fold", wrong)


@fault
def folds_the_raw_weight():
    """Gives the folded model the raw weights."""

    def spoil(model: Any, plain: Any) -> Any:
        with torch.no_grad():
            for name, layer in host.converted(model):
                plain.get_submodule(name).weight.copy_(layer.weight)
        return plain

    with _after_folding(spoil):
        yield


@fault
def folds_in_place():
    """Folds the model itself."""

    def spoil(model: Any, plain: Any) -> Any:
        fw.unconvert_(model)
        return plain

    with _after_folding(spoil):
        yield


@fault
def shares_storage():
    """Lets the folded model share a tensor with the original."""

    def spoil(model: Any, plain: Any) -> Any:
        plain.head.weight = model.head.weight
        return plain

    with _after_folding(spoil):
        yield


def _state(spoil: Callable[[Any, Any], None]) -> AbstractContextManager[Any]:
    """Return a context in which what a converted layer saves is changed."""
    right = host.Hosted._save_to_state_dict

    def wrong(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        right(self, destination, prefix, keep_vars)
        spoil(destination, prefix)

    return patch.object(host.Hosted, "_save_to_state_dict", wrong)


@fault
def forgets_gains():
    """Saves a layer without its gain."""
    with _state(lambda state, prefix: state.pop(f"{prefix}gain", None)):
        yield


@fault
def renames_keys():
    """Saves the raw weight under a name of its own."""

    def spoil(state: Any, prefix: str) -> None:
        state[f"{prefix}raw_weight"] = state.pop(f"{prefix}weight")

    with _state(spoil):
        yield


@fault
def options_lost():
    """Saves tensors alone."""
    with _state(lambda state, prefix: state._metadata[prefix[:-1]].pop("filterwise", None)):
        yield


@fault
def loads_without_a_word():
    """Loads whatever comes."""
    with patch.object(checkpoint, "compare_options", lambda *_: None):
        yield


@fault
def forgets_start():
    """Leaves an old gain beside weights that have none."""
    with patch.object(host, "_start", lambda *_: None):
        yield


@fault
def shares_a_copy():
    """Hands a copy the same raw weight."""
    right = host.Hosted.__reduce_ex__

    def wrong(self: Any, protocol: Any) -> Any:
        make, arguments, state = right(self, protocol)
        return make, arguments, _Uncopied(state)

    with (
        patch.object(host.Hosted, "__reduce_ex__", wrong),
        patch.object(
            host.Hosted,
            "__setstate__",
            lambda self, state: self.__dict__.update(dict(state)),
            create=True,
        ),
    ):
        yield


class _Uncopied(dict):
    """A dictionary that deepcopy hands on as it is."""

    def __deepcopy__(self, memo: Any) -> dict:
        return self


@fault
def never_refreshed():
    """Keeps the first effective weight of evaluation for ever."""
    right, kept = host.effective_weight, {}

    def wrong(module: Any, input: Any = None) -> Tensor:
        if torch.is_grad_enabled():
            return right(module, input)
        return kept.setdefault(id(module), right(module, input))

    with patch.object(host, "effective_weight", wrong):
        yield


@fault
def reads_the_input():
    """Lets the input into the effective weight."""
    right = host.effective_weight

    def wrong(module: Any, input: Any = None) -> Tensor:
        out = right(module, input)
        return out if input is None else out * (1.0 + 1e-6 * input.mean())

    with patch.object(host, "effective_weight", wrong):
        yield


@fault
def reads_the_batch():
    """Lets the size of the batch into the effective weight."""
    right = host.effective_weight

    def wrong(module: Any, input: Any = None) -> Tensor:
        out = right(module, input)
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


@fault
def says_nothing():
    """Leaves the method out of a layer's repr."""
    with patch.object(host.Hosted, "extra_repr", lambda _: ""):
        yield


@fault
def decays_gains():
    """Puts every parameter into the decayed group."""
    groups = [{"weight_decay": 0.1}, {"weight_decay": 0.0, "params": []}]
    with patch.object(
        fw,
        "param_groups",
        lambda model, _: [groups[0] | {"params": list(model.parameters())}, groups[1]],
    ):
        yield
