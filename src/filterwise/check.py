"""What a person should know of a model before a night is lost on it."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise import norms
from filterwise.filters import check_module
from filterwise.findings import (
    LEVELS,
    Finding,
    effective_matrix,
    foreign_findings,
    nonfinite,
    raw_matrix,
    weight_findings,
)
from filterwise.first_step import first_step_findings
from filterwise.graph import trace
from filterwise.graph.untouched import random_states
from filterwise.guard import unguarded
from filterwise.headroom import headroom_findings
from filterwise.host import converted, gain_of, is_converted, state_of
from filterwise.merge import is_batch_norm, is_frozen
from filterwise.methods.parametric_weight_standardization import ParametricWeightStandardization
from filterwise.run_findings import balance_at_rest, run_findings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filterwise.graph import Branch, Flow

__all__ = ["Finding", "check"]

SMALL_BATCH = 4
FREE_RATE = 0.3  # learning rate at which norm-free plain nets were seen to fail
STEEPEST = 3.5  # times lr: the published runs put the largest stable value between 0.35 and 3.5
GROWTH = (10.0, 1000.0)  # of the second moment over all branches: a warning, an error
CENTRED_SHARE = 1 - 1 / math.pi  # of E y^2 that a centred filter sees of a ReLU's output


def check(
    model: nn.Module,
    *,
    batch_size: int | None = None,
    lr: float | None = None,
    input: Any = None,
    loader: Any = None,
) -> list[Finding]:
    """Look for what will not train, is wrong, or is probably harmful.

    Nothing is changed: not the mode, a buffer, a hook, or the random state. The model is run, on a
    copy, only if there is an input.

    Args:
        model: Any model, converted or not.
        batch_size: Samples that one forward sees in training (the micro-batch); by default the
            loader's, if there is one.
        lr: Learning rate, for what depends on it. With a loader of samples and class labels one
            gradient is taken on the copy, to see what a first step would do.
        input: A tensor or a tuple of arguments to run the model on.
        loader: A loader of training batches; where there is no input its first batch is one.

    Returns:
        Findings, errors first, then warnings, then notes, each kind in registration order. An empty
        list is a clean bill.

    Raises:
        ValueError: If the batch size or the learning rate is no positive number, or a batch of the
            loader holds no tensor to run the model on.

    Example:
        >>> import warnings
        >>> from filterwise.convert import convert_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> with warnings.catch_warnings(action="ignore"):
        ...     _ = convert_(model, "ws")
        >>> [finding.layer for finding in check(model)]
        ['0']
    """
    check_module(model)
    if loader is not None and batch_size is None:
        batch_size = getattr(loader, "batch_size", None)
    _positive("batch_size", batch_size)
    _positive("lr", lr)
    batch = None if loader is None else _first_batch(model, loader)
    arguments = input if isinstance(input, tuple) else (input,)
    if input is None:
        arguments = None if batch is None else batch[:1]
    findings: list[Finding] = []
    with torch.no_grad():
        for name, module in model.named_modules():
            findings += nonfinite(name, module)
            if is_converted(module):
                findings += weight_findings(name, module)
        layers = dict(converted(model))
        findings += foreign_findings(model)
        if layers:
            findings += _flow_findings(model, layers, arguments)
            findings += _mergers(model)
        findings += headroom_findings(model, arguments)
        findings += _small_batch(model, batch_size)
        findings += _large_steps(model, layers, lr)
        if lr is not None and batch is not None and len(batch) == 2:
            findings += first_step_findings(model, batch[:1], batch[1], lr)
        if arguments is not None:
            findings += run_findings(model, arguments)
        else:
            findings += balance_at_rest(layers)
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _positive(name: str, value: float | None) -> None:
    good = value is None or (isinstance(value, int | float) and math.isfinite(value) and value > 0)
    if not good:
        raise ValueError(f"{name} must be a number > 0, got {value!r}")


def _first_batch(model: nn.Module, loader: Any) -> tuple[Any, ...]:
    """Return the first batch's input, and its labels where it ends with one for each sample.

    The random states that a loader draws from are put back.
    """
    if hasattr(loader, "__next__"):
        raise ValueError(
            "the loader is an iterator, and looking at its first batch would take it away; give a"
            " DataLoader, a list of batches, or input="
        )
    generators = {
        id(one): one
        for owner in (loader, getattr(loader, "sampler", None))
        if isinstance(one := getattr(owner, "generator", None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        with random_states(model):
            batch = next(iter(loader), None)
    finally:
        for generator, state in states:
            generator.set_state(state)
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, torch.Tensor):
        raise ValueError(
            f"a batch of the loader is a {type(batch).__name__} that does not start with a tensor;"
            " give input="
        )
    device = next(model.parameters(), first).device
    labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if isinstance(labels, torch.Tensor) and labels.dtype == torch.long and labels.dim() == 1:
        return first.to(device), labels
    return (first.to(device),)


def _flow_findings(
    model: nn.Module, layers: dict[str, nn.Module], arguments: tuple[Any, ...] | None
) -> Iterator[Finding]:
    flow = trace(model, arguments)
    bare = [
        name
        for name, module in layers.items()
        if state_of(module).method.needs_norm
        # A gain that keeps the raw weight's scale fixes a sound one.
        and not state_of(module).preserve
        and not flow.normalized(name)
    ]
    for name, module in layers.items():
        if name not in bare and _was_fused(model, name, module) and not flow.normalized(name):
            yield Finding(
                "warning",
                name,
                f"converted with {state_of(module).recipe}, and an Identity stands where the norm"
                " would be",
                "if a BatchNorm was fused into the raw weight after the conversion, the method"
                " takes its factor out again, and the model computes something else",
                "go back to the checkpoint before, and use fold(model, bn=True)",
            )
    for name in bare:
        yield _unnormalized(model, name, layers[name], flow, everywhere=len(bare) == len(layers))
    if not any(norms.normalizes(module) for module in model.modules()):
        yield from _branch_growth(model, flow.branches())


def _unnormalized(
    model: nn.Module, name: str, module: nn.Module, flow: Flow, *, everywhere: bool
) -> Finding:
    state = state_of(module)
    matrix = effective_matrix(module)
    why = "activations lose their scale"
    if matrix is not None:
        norm = float(matrix.norm(dim=1).median())
        why += f": its filters have norm {norm:.3g}, those of a He layer 1.41"
    what = f"nothing normalizes the output of this layer, and {state.method} fixes no sound scale"
    fix = f'convert with "gn+{state.method}", or with "wa", whose filters have He\'s scale'
    if re.match(r"(bn|gn|ln|in|keep)\b", state.recipe):
        fix = f'leave it out of the conversion (exclude="{name}"), or put a norm behind it'
        if _stands_before_identity(model, name):
            fix += (
                ". An Identity follows it: if a BatchNorm was fused into the raw weight after the"
                " conversion, the method takes that out again; go back to the checkpoint before"
                " and use fold(model, bn=True)"
            )
    if flow.how == "registration order":
        what += " (guessed from the order of registration)"
        return Finding("note", name, what, why, f"give input= to see what follows, or {fix}")
    return Finding("error" if everywhere else "warning", name, what, why, fix)


def _was_fused(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Tell a layer whose recipe has a norm, and behind which an Identity stands."""
    has_norm = re.match(r"(bn|keep)\b", state_of(module).recipe)
    return bool(has_norm) and _stands_before_identity(model, name)


def _mergers(model: nn.Module) -> Iterator[Finding]:
    """Find modules that could merge norms into raw weights: `convert_` saw only a part of them."""
    for name, module, method in unguarded(model):
        yield Finding(
            "warning",
            name,
            f"{type(module).__name__}.{method}() may merge norms into the raw weights of converted"
            " layers",
            "these do not compute with their raw weights, so the merged model is another one",
            "fold(model) first; a folded model can be merged",
        )


def _stands_before_identity(model: nn.Module, name: str) -> bool:
    """Tell whether the module registered right after a layer, beside it, is an Identity."""
    parent, _, child = name.rpartition(".")
    siblings = list(model.get_submodule(parent)._modules.items())
    for (one, _), (_, following) in itertools.pairwise(siblings):
        if one == child:
            return type(following) is nn.Identity
    return False


def _branch_growth(model: nn.Module, branches: list[Branch]) -> Iterator[Finding]:
    """Find residual branches that add up with nothing to hold them (specification, 8)."""
    growth, counted = 1.0, []
    for branch in branches:
        last = model.get_submodule(branch.layers[-1])
        if not is_converted(last):
            continue
        if state_of(last).method.needs_norm or not _gain_at_start(last):
            return
        share = math.prod(_factor(model.get_submodule(name)) for name in branch.layers)
        growth *= 1 + share
        counted.append(branch.layers[-1])
    if growth < GROWTH[0]:
        return
    yield Finding(
        "error" if growth >= GROWTH[1] else "warning",
        counted[0],
        f"{len(counted)} residual branches without a norm all start at full gain",
        f"each adds its variance to the trunk, which grows about {growth:.2g}-fold over all of"
        " them: a deep net diverges, or needs a tiny learning rate",
        "initialize_(model, 'branch') sets the last gain of each branch to 1/sqrt(branches);"
        " 'skipinit' or 'fixup' also serve",
    )


def _gain_at_start(module: nn.Module) -> bool:
    state = state_of(module)
    gain = gain_of(module)
    if gain is None:
        return True
    gain = gain.detach().flatten()
    weight = getattr(module, state.parameter).detach()
    if weight.is_meta:
        return False
    start = state.method.gain_start(state.layout.matrix(weight))
    return torch.allclose(gain, start.to(gain.dtype), rtol=1e-4, atol=0)


def _factor(module: nn.Module) -> float:
    """Return what a layer behind a ReLU multiplies the second moment with (specification, 2.3)."""
    matrix = effective_matrix(module) if is_converted(module) else None
    if matrix is None:
        return CENTRED_SHARE
    share = CENTRED_SHARE if state_of(module).method.centred else 1.0
    return float(matrix.square().sum(1).mean()) / 2 * share


def _small_batch(model: nn.Module, batch_size: int | None) -> Iterator[Finding]:
    found = [
        name
        for name, module in model.named_modules()
        if is_batch_norm(module) and not is_frozen(module)
    ]
    if not found or batch_size is None or batch_size > SMALL_BATCH:
        return
    published = (
        "published ResNet-50 runs on ImageNet end at 34.7 % error with 2 samples a worker, 27.3 %"
        " with 4, 23.6 % with 32 (Wu and He, Group Normalization, 2018)"
    )
    why = f"its statistics are noise at that size: {published}; small tasks can suffer less"
    if batch_size == 1:
        why = (
            "a sample is normalized by itself alone in training and by running statistics in"
            f" evaluation, so that the two compute different functions; {published}"
        )
    yield Finding(
        "error" if batch_size == 1 else "warning",
        found[0],
        f"{len(found)} BatchNorms see {batch_size} samples a forward",
        why,
        'convert with "gn+ws", whose result does not depend on the micro-batch',
    )


def _large_steps(
    model: nn.Module, layers: dict[str, nn.Module], lr: float | None
) -> Iterator[Finding]:
    if lr is None or not layers:
        return
    free = not any(norms.normalizes(module) for module in model.modules())
    if free and lr >= FREE_RATE:
        yield Finding(
            "warning",
            next(iter(layers)),
            f"learning rate {lr:g} in a net without activation norms",
            "nothing resets the scale of activations after a large step; plain nets that train at"
            f" 0.1 were seen to fail at {FREE_RATE:g}",
            "a learning rate of 0.1 or less, or gn+ws",
        )
    steepest = [
        (2 * lr / (raw_matrix(module).shape[1] * gamma) if gamma else math.inf, name, method)
        for name, module in layers.items()
        if isinstance(method := state_of(module).method, ParametricWeightStandardization)
        for gamma in [method.gamma_of(raw_matrix(module).shape[1])]
    ]
    bound, name, method = max(steepest, default=(0.0, "", None), key=lambda one: one[0])
    if bound > STEEPEST:
        yield Finding(
            "warning",
            name,
            f"{method} lets a step grow to {bound:.2g} times a plain layer's step at rate 1",
            "as weight decay shrinks Var[W], the step on the effective weight grows to"
            " lr * 2/(n gamma); at n = 576 published runs trained with 0.35, and 3.5 became NaN",
            "a larger gamma (relative bounds it by 10 lr), or a smaller learning rate",
        )
