"""Findings that need the layers' inputs: means that cannot balance, overflow, weights read raw."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise import verify
from filterwise.balance import batched
from filterwise.findings import Finding
from filterwise.host import converted, state_of
from filterwise.merge import fold_layers
from filterwise.methods.equinorm import EquilibriumNormalization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["balance_at_rest", "run_findings"]


def balance_at_rest(layers: dict[str, nn.Module]) -> Iterator[Finding]:
    """Judge EquiNorm layers by their running means, where there are any."""
    for name, module in layers.items():
        method = state_of(module).method
        if isinstance(method, EquilibriumNormalization):
            buffers: Any = module
            if buffers.input_mean.is_meta:
                continue
            if int(buffers.num_batches_tracked) > 0:
                yield from _balance(name, module, method, buffers.input_mean)
            elif not module.training:
                yield Finding(
                    "warning",
                    name,
                    "an EquiNorm layer in evaluation that has seen no training batch",
                    "it balances its filters for input means of 1",
                    "train it, or run a few batches in training mode, before evaluation",
                )


def _balance(
    name: str,
    module: nn.Module,
    method: EquilibriumNormalization,
    mean: Tensor,
    size: Tensor | None = None,
) -> Iterator[Finding]:
    weight = getattr(module, state_of(module).parameter).detach()
    for level, words in method.problems(weight, mean.to(weight.device), size):
        what, _, fix = words.partition(";")
        wrong = level == "error"
        yield Finding(
            "error" if wrong else "warning",
            name,
            f"the EquiNorm layer {what}",
            "filters are balanced by the means of their input, and these cannot balance them"
            if wrong
            else "the balance of positive and negative parts, which fixes the scale, fails there",
            fix.strip() or "look at these filters and at the input of the layer",
        )


def run_findings(model: nn.Module, arguments: tuple[Any, ...]) -> Iterator[Finding]:
    """Run a copy in evaluation mode; EquiNorm takes the means of this very input."""
    with torch.inference_mode(False):
        ran = copy.deepcopy(model)
    found: list[Finding] = []
    handles = [
        module.register_forward_pre_hook(_look_at_input(name, found))
        for name, module in converted(ran)
        if isinstance(state_of(module).method, EquilibriumNormalization)
    ]
    overflowing: list[str] = []
    for name, module in ran.named_modules():
        handles.append(module.register_forward_hook(_look_at_output(name, overflowing)))
    try:
        with verify.evaluating(ran):
            ran(*arguments)
    except Exception as error:
        yield Finding(
            "error",
            "",
            f"the model does not run on the input: {type(error).__name__}: {error}",
            "nothing that needs a run was looked at",
            "give an input, or a tuple of arguments, that the model takes in evaluation mode",
        )
        return
    finally:
        for handle in handles:
            handle.remove()
    yield from found
    if overflowing:
        yield Finding(
            "error",
            overflowing[0],
            "the output holds NaN or infinity on the input, whose own values are finite",
            "every layer behind it computes with that",
            "look at its weights and at the size of its input; float16 ends at 65504",
        )
    elif any(True for _ in converted(ran)):
        yield from _read_behind(ran, arguments)


def _look_at_input(name: str, found: list[Finding]) -> Callable[..., None]:
    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        layer: Any = module
        method = state_of(module).method
        assert isinstance(method, EquilibriumNormalization)
        linear = isinstance(module, nn.Linear)
        x = batched(module, inputs[0])
        if x.numel() == 0:
            return
        # One process alone must not wait for the statistics of the others.
        alone = dataclasses.replace(method, synchronize=False)
        mean = alone.input_mean(x, -1 if linear else 1)
        size = alone.input_mean(x.to(torch.float32).square(), -1 if linear else 1).sqrt()
        layer.input_mean.copy_(mean)
        layer.num_batches_tracked.fill_(1)
        found.extend(_balance(name, module, method, mean, size))

    return look


def _look_at_output(name: str, overflowing: list[str]) -> Callable[..., None]:
    def look(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        def finite(value: Any) -> bool:
            return all(bool(one.isfinite().all()) for one in verify.floating_tensors(value))

        if not overflowing and not finite(output) and finite(inputs):
            overflowing.append(name)

    return look


def _read_behind(model: nn.Module, arguments: tuple[Any, ...]) -> Iterator[Finding]:
    """Find code that reads a raw weight in place of calling the layer: folding changes it."""
    plain = copy.deepcopy(model)
    fold_layers(plain)
    # Without hooks, which would keep fast paths that read weights from being taken.
    with verify.evaluating(model):
        expected = model(*arguments)
    with verify.evaluating(plain):
        found = plain(*arguments)
    dtypes = [one.dtype for one in verify.floating_tensors(expected)]
    limit = max(map(verify.tolerance, dtypes), default=math.inf)
    difference = verify.relative_difference(expected, found)
    if difference <= limit:
        return
    first = verify.first_suspect(model, plain, arguments, limit) or ""
    yield Finding(
        "error",
        first,
        f"computes something else when folded (relative difference {difference:.2g})",
        "its code reads the raw weight of a converted layer in place of calling the layer, so the"
        " method has no effect there",
        "leave that layer out of the conversion (exclude=), or call the layer",
    )
