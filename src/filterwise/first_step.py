"""Findings that need one gradient: how far a first step would turn and shift the filters."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from filterwise import norms
from filterwise.diagnose.layers import Layer, chosen_layers
from filterwise.diagnose.weight_signals import angle
from filterwise.findings import Finding
from filterwise.graph import trace
from filterwise.graph.untouched import random_states

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = [
    "SHIFT",
    "first_step_findings",
    "is_first_step",
    "is_normalized",
    "shift_why",
    "turn_fix",
    "turn_limit",
    "turn_why",
]

TURN, TURN_BEFORE_NORMS = 10.0, 30.0
FIRST = "a first step"
SHIFT = 2.0  # what n mean(W) varies by over the filters of a He layer


def is_normalized(model: nn.Module) -> bool:
    """Tell whether a model has norms of activations, LayerNorm among them."""
    return any(
        norms.normalizes(module) or isinstance(module, nn.LayerNorm | nn.RMSNorm)
        for module in model.modules()
    )


def is_first_step(finding: Finding) -> bool:
    """Tell whether `first_step_findings` found it."""
    return finding.what.startswith(FIRST)


def turn_limit(normalized: bool) -> float:
    """Return how far a step may turn the median filter of a layer, in degrees."""
    return TURN_BEFORE_NORMS if normalized else TURN


def turn_why(normalized: bool) -> str:
    """Say why filters should not turn further."""
    if normalized:
        return "activation norms forgive more than plain nets do, but runs beyond it were lost"
    return (
        "without activation norms nothing resets the scale of activations after a large step; small"
        " nets that trained well mostly stayed below, and most that went over were lost"
    )


def turn_fix(rate: float, turn: float, limit: float, normalized: bool) -> str:
    """Say what to do against it: the angle goes with the rate, and half the limit leaves room."""
    return (
        f"a learning rate of {rate * limit / turn / 2:.1g} in place of {rate:.2g}, a warm-up, or"
        " clip_grad_adaptive_" + ("" if normalized else '; or "gn+ws"')
    )


def shift_why() -> str:
    """Say why the average gradient should not shift."""
    return (
        f"{SHIFT:g} is the variance of n E[W] in a layer as He starts it, so one step moves the"
        " means of channels further apart than they ever were; whole channels die of it"
    )


def first_step_findings(
    model: nn.Module, arguments: tuple[Any, ...], labels: Any, rate: float
) -> Iterator[Finding]:
    """Take one gradient on a copy, and judge the step of plain SGD that it would make.

    Nothing is found where the outputs are no logits ``(samples, classes)`` of the labels, since the
    loss is then not known, or where several processes train: one alone must not wait for others.
    """
    if distributed.is_available() and distributed.is_initialized():
        return
    with random_states(model), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        with torch.inference_mode(False):
            ran = copy.deepcopy(model).train()
        try:
            loss = _loss(ran(*arguments), labels)
            if loss is None or not loss.isfinite():
                return
            loss.backward()
        except Exception:
            # What does not run is a finding of those that run it in evaluation.
            return
    normalized = is_normalized(model)
    limit = turn_limit(normalized)
    turned, shifted = [], []
    for layer in chosen_layers(ran):
        if layer.weight.grad is None:
            continue
        turn, shift = _moved(layer, rate)
        turned += [(turn, layer.name)] if turn >= limit else []
        shifted += [(shift, layer.name)] if shift >= SHIFT and not layer.is_centred else []
    step = f"{FIRST} of plain SGD at {rate:g} (cross-entropy, the loader's first batch)"
    if turned:
        turn, name = max(turned)
        yield Finding(
            "warning",
            name,
            f"{step} turns its filters by {turn:.3g} degrees (median), over the limit of"
            f" {limit:g}{_count(turned)}",
            turn_why(normalized),
            turn_fix(rate, turn, limit, normalized),
        )
    if shifted and not normalized:
        # The channels of a classifier are the classes, whose means have to part.
        flow = trace(model, arguments)
        shifted = [one for one in shifted if not flow.is_last(one[1])]
    if shifted and not normalized:
        shift, name = max(shifted)
        yield Finding(
            "warning",
            name,
            f"{step} shifts the average of its filters: Var of n E[dW] over filters is"
            f" {shift:.3g}{_count(shifted)}",
            shift_why(),
            'a method that centres filters ("wa", "pws") has no such part; or a smaller learning'
            " rate",
        )


def _loss(output: Any, labels: Tensor) -> Tensor | None:
    """Return the cross-entropy, if an output can be logits of the labels."""
    if not (isinstance(output, torch.Tensor) and output.dim() == 2 and output.is_floating_point()):
        return None
    labels = labels.to(output.device)
    if len(labels) != len(output) or int(labels.min()) < 0 or int(labels.max()) >= output.shape[1]:
        return None
    return nn.functional.cross_entropy(output.float(), labels)


def _moved(layer: Layer, rate: float) -> tuple[float, float]:
    """Return the median angle of a step in degrees, and Var over filters of n E[dW]."""
    gradient = layer.weight.grad
    assert gradient is not None
    before, step = layer.matrix(layer.weight), rate * layer.matrix(gradient)
    shift = (step.mean(1).double() * step.shape[1]).var(correction=0)
    after = before - step
    if layer.is_centred:
        before, after = (one - one.mean(1, keepdim=True) for one in (before, after))
    return float(torch.rad2deg(angle(before, after).nan_to_num(0.0)).median()), float(shift)


def _count(layers: list[Any]) -> str:
    return f" ({len(layers)} such layers)" if len(layers) > 1 else ""
