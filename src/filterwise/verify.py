"""Do two modules compute the same: seeded inputs, quiet evaluation, one number as the answer."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from filterwise.errors import FilterwiseWarning
from filterwise.filters import CONVOLUTIONS, TRANSPOSED
from filterwise.graph.untouched import random_states
from filterwise.host import converted, state_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = [
    "evaluating",
    "first_difference",
    "first_suspect",
    "floating_tensors",
    "relative_difference",
    "seeded_input",
    "tolerance",
    "widened",
]

SEED = 2019
SAMPLES = 2
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
HALF_TOLERANCE = 2e-2


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest relative difference that rounding explains: 1e-4, 1e-9, or 2e-2 (half)."""
    return TOLERANCES.get(dtype, HALF_TOLERANCE)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module in evaluation mode and leave no trace of it.

    Every submodule's mode and the random states are put back, so that the next run draws the same
    numbers. Inside there is no gradient, no inference mode, no autocast and no warning of
    filterwise.
    """
    modes = [(part, part.training) for part in module.modules()]
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {device.type for device in devices if device.type != "meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(random_states(module))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FilterwiseWarning)
        try:
            module.eval()
            yield
        finally:
            for part, mode in modes:
                part.training = mode


def seeded_input(module: nn.Module) -> Tensor | None:
    """Return a normal input that a convolution or linear layer accepts, the same at every call.

    Returns:
        Tensor of two samples, as small as the kernel, its dilation and its padding allow, in the
        weight's dtype and on its device; None for any other module.
    """
    generator = torch.Generator("cpu").manual_seed(SEED)
    if isinstance(module, nn.Linear):
        shape = (SAMPLES, module.in_features)
    elif isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        sizes = []
        for axis, kernel in enumerate(module.kernel_size):
            reach = module.dilation[axis] * (kernel - 1) + 1
            padding = 0 if isinstance(module.padding, str) else int(module.padding[axis])
            # Reflected padding must be smaller than the input; transposed layers cut their output.
            sizes.append(max(reach, padding + 1, 2 * padding) + module.stride[axis])
        shape = (SAMPLES, module.in_channels, *sizes)
    else:
        return None
    weight = module.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    x = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    return x.to(weight.device, weight.dtype)


def relative_difference(expected: object, found: object) -> float:
    """Return the largest difference of two outputs, relative to the largest entry of its tensor.

    Outputs are tensors, or any nesting of tuples, lists, dictionaries and dataclasses of them.
    Two NaNs, and two infinities of one sign, are equal. Outputs of other shapes or with other
    parts are infinitely different; what is no floating tensor does not count.
    """
    ours, theirs = floating_tensors(expected), floating_tensors(found)
    if len(ours) != len(theirs):
        return math.inf
    return max((_difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def floating_tensors(output: object) -> list[Tensor]:
    """Return the floating tensors in a nested output, in order."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point():
                found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += floating_tensors(vars(leaf))
    return found


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    a, b = (t.detach().cpu().to(torch.float64) for t in (expected, found))
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs()).max().item()
    scale = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
    if gap == 0:
        return 0.0
    return math.inf if math.isnan(gap) else gap / max(scale, torch.finfo(expected.dtype).tiny)


def widened(module: nn.Module) -> nn.Module:
    """Return a copy in float64, on the same device unless that has no float64."""
    wide = copy.deepcopy(module)
    tensors = (*wide.parameters(), *wide.buffers())
    if any(tensor.device.type == "mps" for tensor in tensors):
        wide = wide.cpu()
    return wide.double()


def first_suspect(
    expected: nn.Module,
    found: nn.Module,
    arguments: tuple[Any, ...],
    limit: float,
    leave_out: Collection[str] = (),
) -> str | None:
    """Return the layer that most likely makes two models differ.

    That is the first converted layer of `expected` that a run never calls although its raw weight
    bears on the output, so that something else must read it; if there is none, what
    `first_difference` returns, with its arguments.
    """
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda _module, _input, _output, name=name: called.add(name))
        for name, module in converted(expected)
    ]
    try:
        with evaluating(expected):
            output = expected(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in converted(expected):
        if name not in called:
            other = copy.deepcopy(expected)
            weight = getattr(other.get_submodule(name), state_of(module).parameter)
            with torch.no_grad(), evaluating(other):
                weight.mul_(2)
                if relative_difference(output, other(*arguments)) > 0:
                    return name
    return first_difference(expected, found, arguments, limit, leave_out)


def first_difference(
    expected: nn.Module,
    found: nn.Module,
    arguments: tuple[Any, ...],
    limit: float,
    leave_out: Collection[str] = (),
) -> str | None:
    """Run two models with the same module names and return the first module that differs.

    Args:
        expected: The model to compare with; hooks are put on it and taken off again.
        found: The other model, likewise.
        arguments: What both are called with.
        limit: Largest relative difference that counts as equal.
        leave_out: Names whose outputs may differ.

    Returns:
        Name of the module that first hands back another output, inner modules before outer ones;
        None if there is none, or the model differs outside of its modules.
    """
    outputs: dict[str, list[Any]] = {}
    differing: list[str] = []
    calls: dict[str, int] = {}

    def keep(name: str, output: Any) -> None:
        outputs.setdefault(name, []).append(output)

    def compare(name: str, output: Any) -> None:
        call = calls[name] = calls.get(name, -1) + 1
        before = outputs.get(name, [])
        if call >= len(before) or relative_difference(before[call], output) > limit:
            differing.append(name)

    for model, see in ((expected, keep), (found, compare)):
        handles = [
            module.register_forward_hook(
                lambda _module, _input, output, name=name, see=see: see(name, output)
            )
            for name, module in model.named_modules()
            if name and name not in leave_out
        ]
        try:
            with evaluating(model):
                model(*arguments)
        finally:
            for handle in handles:
                handle.remove()
    return differing[0] if differing else None
