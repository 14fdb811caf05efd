"""Keeping the function of a model through its conversion, and saying how near it came."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from filterwise.errors import ConversionError
from filterwise.merge import is_batch_norm, is_frozen
from filterwise.preserve.alone import Alone
from filterwise.preserve.carry import set_bias, set_factor
from filterwise.preserve.probes import (
    compare_networks,
    input_of,
    layer_probe,
    norm_probe,
    normalized,
    output_of,
    standing,
)
from filterwise.preserve.recalibration import (
    InputMeans,
    LayerSite,
    NormSite,
    Site,
    recalibrate,
)
from filterwise.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from filterwise.draft import Draft
    from filterwise.preserve.batches import Batches
    from filterwise.preserve.probes import Probe
    from filterwise.report import Row

__all__ = ["Preservation"]


class Preservation:
    """One conversion that keeps the function: made before anything of the model is changed."""

    def __init__(self, model: nn.Module, drawn: Draft, batches: Batches | None) -> None:
        """Note what the model computes: on seeded numbers, or as a copy where there is a loader.

        Raises:
            ConversionError: If the model cannot be copied.
        """
        self.model, self.drawn, self.batches = model, drawn, batches
        names = {id(module): name for name, module in model.named_modules()}
        self.norms = {names[id(norm)]: (norm, new) for norm, new in drawn.norms}
        self.carries = {carry.layer_name: carry for carry in drawn.carries}
        self.probes = list(self._probes())
        self.original = None if batches is None else _copied(model)
        self.alone = Alone()
        if batches is None:
            self._try_parts()

    def _probes(self) -> Iterator[Probe]:
        for layer in self.drawn.layers:
            yield layer_probe(layer.name, layer.module_name, self.carries.get(layer.module_name))
        for name in self.norms:
            yield norm_probe(name, removed=self.drawn.removes)

    def _try_parts(self) -> None:
        for layer, probe in zip(self.drawn.layers, self.probes, strict=False):
            self.alone.try_layer(probe, layer.module, layer.parameter)
        by_norm = {carry.norm_name: carry for carry in self.drawn.carries}
        for name, (norm, new) in self.norms.items():
            after = None if self.drawn.removes else new
            self.alone.try_norm(name, norm, after, by_norm.get(name))

    def carry(self, undo: list[Callable[[], None]]) -> None:
        """Write what layers take over from norms; the layers are converted by now."""
        for carry in self.drawn.carries:
            bias = carry.layer._parameters["bias"]
            undo.append(_restoring([bias]))
            set_bias(carry.layer, carry.moved(bias))
            if carry.scales:
                set_factor(carry.layer, carry.factor())

    def finish(self, undo: list[Callable[[], None]]) -> Report:
        """Go through the loader, if there is one, and return the report with its figures."""
        if self.original is None or self.batches is None:
            figures = self.alone.figures()
            return self._report(figures, set(), _ALONE)
        sites, inputs = list(self._sites()), list(self._inputs())
        undo.append(_restoring([tensor for site in sites for tensor in site.tensors()]))
        count = recalibrate(self.original, self.model, sites, inputs, self.batches)
        factors = {one.module: one.scale() for one in sites if isinstance(one, LayerSite)}
        for one in inputs:
            carry = self.carries.get(one.module)
            ones = torch.ones(()) if carry is None else carry.factor()
            one.write(factors.get(one.module, ones))
        figures, whole = compare_networks(
            self.original, self.model, self.probes, self.batches.first
        )
        changed = {site.row for site in sites if site.changed}
        words = (
            f"Recalibrated on {count} batch{'' if count == 1 else 'es'}: {len(changed)} of"
            f" {len(sites)} layers and norms were set, the others computed what they did."
            f" {_TOGETHER} The model's output differs by {whole:.2g}."
        )
        return self._report(figures, changed, words)

    def _report(self, figures: dict[str, float], changed: set[str], words: str) -> Report:
        def told(row: Row) -> Row:
            reason = row.reason
            if row.name in changed and row.action != "add":
                reason = f"{reason}; recalibrated" if reason else "recalibrated"
            return dataclasses.replace(row, reason=reason, difference=figures.get(row.name))

        report = self.drawn.report
        return Report([told(row) for row in report], [*report.notes, words], report.recipe)

    def _sites(self) -> Iterator[Site]:
        """Yield the places to match: where a norm stands, that norm; else the layer."""
        layers = {layer.module_name: layer.name for layer in self.drawn.layers}
        removed = self.norms if self.drawn.removes else {}
        for name, module in self.model.named_modules():
            norm = self.drawn.followed.get(name)
            if name in layers and (norm is None or norm in removed):
                yield self._layer_site(layers[name], name, module, norm)
            elif (
                norm is not None and norm in removed and module._parameters.get("bias") is not None
            ):
                yield LayerSite(name, norm, normalized, name, module, None)
            elif name in self.norms and name not in removed:
                yield self._norm_site(name, module)
            elif is_batch_norm(module) and not is_frozen(module):
                yield NormSite(name, input_of, module, new=False)

    def _layer_site(self, row: str, name: str, module: nn.Module, norm: str | None) -> LayerSite:
        carry = self.carries.get(name)
        layer = next(one for one in self.drawn.layers if one.module_name == name)
        factor = torch.ones(layer.filters) if carry is None else carry.factor()
        factor = factor.to(layer.weight.device)
        if norm is None:
            return LayerSite(row, name, output_of, name, module, factor)
        return LayerSite(row, norm, normalized, name, module, factor)

    def _norm_site(self, name: str, module: nn.Module) -> NormSite:
        known = getattr(self.norms[name][0], "running_mean", None) is not None
        if known and is_batch_norm(standing(module)):  # its statistics were taken over
            return NormSite(name, input_of, module, new=False)
        return NormSite(name, normalized, module, new=True)

    def _inputs(self) -> Iterator[InputMeans]:
        for layer in self.drawn.layers:
            if "input_mean" in layer.module._buffers:
                yield InputMeans(layer.module_name, layer.module)


_ALONE = (
    "Differences are each layer's and norm's alone, in evaluation mode, on seeded numbers: normal"
    " ones for a layer, of its running mean and variance for a norm. Give loader= to match the"
    " network on data, and to see them there."
)
_TOGETHER = (
    "Differences are of the whole network in evaluation mode, at each row, on the first batch."
)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ConversionError(
            f"the model cannot be copied, as a loader needs to compare it with itself:"
            f" {type(error).__name__}: {error}. Convert without loader=. The model is unchanged."
        ) from error


def _restoring(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Return what gives tensors the values back that they have now."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore() -> None:
        for tensor, value in before:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value)

    return restore
