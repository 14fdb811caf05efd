"""Folding: a plain model that computes what a converted one computes in evaluation.

Each converted layer becomes the layer it was, with its effective weight in place of the raw one;
with ``bn=True`` a BatchNorm in evaluation mode goes into the layer before it. GroupNorm, LayerNorm
and InstanceNorm depend on the sample and stay.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from filterwise import norms, verify
from filterwise.errors import ConversionError, FilterwiseWarning, FoldError
from filterwise.filters import check_module, weight_name
from filterwise.graph import trace
from filterwise.host import (
    converted,
    is_converted,
    refuse_to_take_off,
    state_of,
    weight_label,
)
from filterwise.merge import (
    fold_layer,
    fold_layers,
    is_batch_norm,
    is_frozen,
    merge,
    merge_pairs,
    why_kept,
    why_not_merged,
)
from filterwise.report import FoldReport, FoldRow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["fold", "fold_report", "fold_with_report"]

logger = logging.getLogger("filterwise")

UNCHANGED = "The model is unchanged."


def fold(model: nn.Module, *, bn: bool = False, example_input: Any = None) -> nn.Module:
    """Return a plain copy of a model that computes what the model computes in evaluation.

    The original is not touched and shares no storage with the copy, in which nothing of filterwise
    is left. Parameters keep their dtype, strides and ``requires_grad``, modules their mode. Each
    layer is compared with its original on seeded inputs. More than 1e-4 (float32), 1e-9 (float64)
    or 2e-2 (half) of the largest output is repeated on float64 copies, to tell rounding from error.
    The report is logged to the logger ``filterwise``; `fold_report` returns it.

    Args:
        model: A model with converted layers.
        bn: Merge each BatchNorm that follows a layer directly into that layer.
        example_input: A tensor, or a tuple of arguments, to compare the whole model on too.

    Returns:
        A new model; a mere copy, with a warning, if there was nothing to fold.

    Raises:
        FoldError: If the copy would not compute the same; with ``bn=True`` also if a BatchNorm is
            in training mode, or if it cannot be seen which layer a norm follows.

    Example:
        >>> from filterwise.convert import convert_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> _ = convert_(model, "wa")
        >>> fold(model)[0]
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    return _Folding(model, bn, example_input).run()[0]


def fold_report(model: nn.Module, *, bn: bool = False, example_input: Any = None) -> FoldReport:
    """Fold as `fold` does, and return the report in place of the model.

    Arguments and errors are those of `fold`.
    """
    return _Folding(model, bn, example_input).run()[1]


def fold_with_report(
    model: nn.Module, *, bn: bool = False, example_input: Any = None
) -> tuple[nn.Module, FoldReport]:
    """Fold as `fold` does, and return the model and the report."""
    return _Folding(model, bn, example_input).run()


class _Folding:
    """One fold: the original, its plain copy, and what is found out on the way."""

    def __init__(self, model: nn.Module, bn: bool, example_input: Any) -> None:
        check_module(model)
        self.model = model
        self.bn = bn
        self.arguments = _arguments(example_input)
        self.layers = dict(converted(model))
        self.merged: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.differences: dict[str, float | None] = {}
        self.notes: list[str] = []

    def run(self) -> tuple[nn.Module, FoldReport]:
        self.refuse_meta()
        try:
            refuse_to_take_off(self.model)
        except ConversionError as error:
            raise FoldError(str(error)) from None
        with torch.inference_mode(False), torch.no_grad():
            plain = _copy(self.model)
            fold_layers(plain)
            if self.bn:
                self.find_pairs(plain)
            merge_pairs(plain, self.merged)
            for name in {**self.layers, **self.merged}:
                self.compare_layer(name, plain.get_submodule(name))
            end_to_end = None if self.arguments is None else self.compare_models(plain)
        unseen = self.unseen()
        report = FoldReport(list(self.rows(plain)), end_to_end, self.notes)
        logger.info("%s", report)
        if unseen:
            warnings.warn(unseen, FilterwiseWarning, stacklevel=3)
        if not self.layers and not self.merged:
            more = " and no BatchNorm can be merged" if self.bn else ""
            warnings.warn(
                f"nothing to fold: no layer of the model is converted{more}; fold returns a copy.",
                FilterwiseWarning,
                stacklevel=3,
            )
        return plain, report

    def refuse_meta(self) -> None:
        for name, module in self.layers.items():
            if getattr(module, state_of(module).parameter).is_meta:
                raise FoldError(
                    f"{_label(name, module)} is on the meta device and has no values to fold; load"
                    f" its weights first. {UNCHANGED}"
                )

    def find_pairs(self, plain: nn.Module) -> None:
        """Find which BatchNorm goes into which layer; say of each other one why it stays."""
        found = {name: module for name, module in plain.named_modules() if is_batch_norm(module)}
        for name, norm in found.items():
            if norm.training and not is_frozen(norm):
                raise FoldError(
                    f"{_label(name, norm)} is in training mode, where it normalizes by its batch,"
                    f" which no constant weight can do. Call model.eval() first. {UNCHANGED}"
                )
        if not found:
            return
        flow = trace(plain, self.arguments)
        if flow.how == "registration order":
            raise FoldError(
                f"bn=True has to know which layer each BatchNorm follows. {flow.sentence} Give"
                f" (another) example_input, or fold with bn=False. {UNCHANGED}"
            )
        self.notes.append(flow.sentence)
        hosts = {flow.sole_norm(name): name for name, m in plain.named_modules() if weight_name(m)}
        for name, norm in found.items():
            layer = hosts.get(name)
            if layer is None:
                self.reasons[name] = "no single convolution or linear layer hands its output to it"
                continue
            host = plain.get_submodule(layer)
            asks_for = "example_input" if self.arguments is None else None
            reason = why_not_merged(host, norm, asks_for=asks_for)
            if reason is None:
                self.merged[layer] = name
            else:
                self.reasons[name] = f"follows {layer}, but {reason}"

    def compare_layer(self, name: str, folded: nn.Module) -> None:
        """Compare a layer, with the norm merged into it, to its original on a seeded input."""
        self.differences[name] = None
        original = copy.deepcopy(self.model.get_submodule(name))
        norm = (
            copy.deepcopy(self.model.get_submodule(self.merged[name]))
            if name in self.merged
            else None
        )
        rest = None if norm is None else norms.replacement(norm, "none")[0]
        x = verify.seeded_input(original)
        if x is None:
            advice = "" if self.arguments is not None else "; give example_input to compare it"
            self.reasons[name] = f"not compared alone: its input is not known{advice}"
            return
        weight: Any = folded.weight
        limit = verify.tolerance(weight.dtype)
        try:
            expected = _run_parts((original, norm), x)
        except Exception as error:
            self.reasons[name] = f"not compared alone: {type(error).__name__}: {error}"
            return
        difference = verify.relative_difference(expected, _run_parts((folded, rest), x))
        self.differences[name] = difference
        if difference <= limit:
            return
        exact = _difference_in_float64(original, norm, rest, x)
        figures = f"{difference:.2g} in {str(weight.dtype)[6:]}, {exact:.2g} in float64"
        if exact > verify.tolerance(torch.float64):
            raise FoldError(
                f"{_label(name, folded)} computes something else when folded: largest relative"
                f" difference {figures} (allowed: {limit:g} and 1e-09), so it is not rounding."
                f" Leave it out of the conversion (exclude={name!r}). {UNCHANGED}"
            )
        self.reasons[name] = f"rounding: {figures}"

    def compare_models(self, plain: nn.Module) -> float | None:
        """Compare the whole model on the example input."""
        assert self.arguments is not None
        expected = self.run_original(_copy(self.model), self.arguments)
        outputs = verify.floating_tensors(expected)
        if not outputs:
            self.notes.append("The model's output holds no floating tensor to compare.")
            return None
        if not all(bool(one.isfinite().all()) for one in outputs):
            self.notes.append("The output on example_input is not finite, so it shows little.")
        difference = verify.relative_difference(expected, _run(plain, self.arguments))
        dtypes = [p.dtype for p in plain.parameters() if p.is_floating_point()]
        limit = max(map(verify.tolerance, dtypes or [torch.float32]))
        if difference <= limit:
            return difference
        wide = verify.widened(self.model)
        again = copy.deepcopy(wide)
        fold_layers(again)
        merge_pairs(again, self.merged)
        arguments = _widen(self.arguments, wide)
        expected = self.run_original(wide, arguments)
        exact = verify.relative_difference(expected, _run(again, arguments))
        figures = f"{difference:.2g}, on float64 copies {exact:.2g}"
        strict = verify.tolerance(torch.float64)
        if exact > strict:
            first = verify.first_suspect(wide, again, arguments, strict, self.merged)
            where = (
                "" if first is None else f", first in {_label(first, plain.get_submodule(first))}"
            )
            raise FoldError(
                f"the folded model differs from the original on example_input{where}: largest"
                f" relative difference {figures} (allowed: {limit:g} and {strict:g}), so it is not"
                " rounding. The usual cause is code that reads a layer's raw .weight in place of"
                f" calling the layer; leave that layer out of the conversion. {UNCHANGED}"
            )
        self.notes.append(f"The whole model differs by rounding: {figures}.")
        return difference

    def run_original(self, model: nn.Module, arguments: tuple[Any, ...]) -> Any:
        try:
            return _run(model, arguments)
        except Exception as error:
            shapes = [tuple(one.shape) for one in verify.floating_tensors(arguments)]
            raise FoldError(
                f"the model does not run on example_input (shapes {shapes}):"
                f" {type(error).__name__}: {error}. Give a tensor, or a tuple of the arguments that"
                f" it takes. {UNCHANGED}"
            ) from error

    def unseen(self) -> str:
        """Say which EquiNorm layers were folded with input means that no batch has set."""
        names = [
            name
            for name, module in self.layers.items()
            if state_of(module).method.uses_input and not int(_batches(module))
        ]
        if not names:
            return ""
        text = (
            f"{len(names)} EquiNorm layers have seen no training batch (first: {names[0]}): they"
            " were folded with input means of 1."
        )
        self.notes.append(text)
        return text

    def rows(self, plain: nn.Module) -> Iterator[FoldRow]:
        hosts = {norm: layer for layer, norm in self.merged.items()}
        for name, module in self.model.named_modules():
            kind = type(module).__name__
            if name in self.layers:
                label = weight_label(name, module)
                reasons = [f"{self.merged[name]} merged into it"] if name in self.merged else []
                reasons += [self.reasons[name]] if name in self.reasons else []
                kind = type(plain.get_submodule(name)).__name__
                difference = self.differences[name]
                yield FoldRow(label, kind, "fold", difference, "; ".join(reasons))
            elif name in hosts:
                host = hosts[name]
                yield FoldRow(name, kind, "merge", self.differences[host], f"into {host}")
            elif norms.is_norm(module):
                reason = self.reasons.get(name) or why_kept(module)
                yield FoldRow(name, kind, "keep", None, reason)


def _arguments(example_input: Any) -> tuple[Any, ...] | None:
    if example_input is None:
        return None
    return example_input if isinstance(example_input, tuple) else (example_input,)


def _label(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _batches(module: Any) -> Any:
    return getattr(module, "num_batches_tracked", 1)


def _copy(model: nn.Module) -> nn.Module:
    """Copy a model; tensors that were made in inference mode become ordinary ones."""
    try:
        plain = copy.deepcopy(model)
    except Exception as error:
        raise FoldError(
            f"the model cannot be copied: {type(error).__name__}: {error}. Unwrap the model, or"
            f" free it of tensors that carry a graph. {UNCHANGED}"
        ) from error
    ordinary: dict[int, Tensor] = {}
    for module in plain.modules():
        for home in (module._parameters, module._buffers):
            for name, tensor in home.items():
                if tensor is not None and tensor.is_inference():
                    if id(tensor) not in ordinary:
                        fresh = tensor.detach().clone()
                        if isinstance(tensor, nn.Parameter):
                            fresh = nn.Parameter(fresh, tensor.requires_grad)
                        ordinary[id(tensor)] = fresh
                    home[name] = ordinary[id(tensor)]  # pyright: ignore[reportArgumentType]
    return plain


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    with verify.evaluating(model):
        return model(*arguments)


def _run_parts(parts: tuple[nn.Module, nn.Module | None], x: Tensor) -> Any:
    """Run a layer and what follows it, without hooks: they are the user's and may have effects."""
    for part in parts:
        if part is not None:
            with verify.evaluating(part):
                x = part.forward(x)
    return x


def _difference_in_float64(
    original: nn.Module, norm: nn.Module | None, rest: nn.Module | None, x: Tensor
) -> float:
    wide = verify.widened(original)
    wide_norm = None if norm is None else verify.widened(norm)
    again = copy.deepcopy(wide)
    if is_converted(again):
        fold_layer(again)
    if wide_norm is not None:
        merge(again, wide_norm)
    x = _widen((x,), wide)[0]
    return verify.relative_difference(
        _run_parts((wide, wide_norm), x), _run_parts((again, rest), x)
    )


def _widen(arguments: tuple[Any, ...], model: nn.Module) -> tuple[Any, ...]:
    """Return arguments in float64, on the device of a widened model."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return pytree.tree_map_only(
        torch.Tensor,
        lambda value: value.to(device, torch.float64) if value.is_floating_point() else value,
        arguments,
    )
