"""Faults of conversion, folding and checkpoints, for the laws on whole models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import filterwise as fw
from filterwise import checkpoint, convert, host, values
from support.faults import FAULTS, fault

__all__ = ["FAULTS"]


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
    with patch.object(host, "start", lambda *_: None):
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

    def wrong(module: Any, input: Any = None, dtype: Any = None) -> Tensor:
        if torch.is_grad_enabled():
            return right(module, input, dtype)
        return kept.setdefault(id(module), right(module, input, dtype))

    with patch.object(host, "effective_weight", wrong):
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


def _preserving(spoil: Callable[[Tensor, Tensor | None], Any]) -> AbstractContextManager[Any]:
    """Return a context in which a preserved layer starts with another gain or offset."""
    right = values.preserving_values

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return spoil(*right(*args, **kwargs))

    return patch.object(values, "preserving_values", wrong)


@fault
def mean_not_put_back():
    """Undoes the division and leaves the filter centred."""
    with _preserving(lambda gain, offset: (gain, None if offset is None else 0 * offset)):
        yield


@fault
def division_not_undone():
    """Puts the mean back and leaves the filter at the method's scale."""
    with _preserving(lambda gain, offset: (torch.ones_like(gain), offset)):
        yield
