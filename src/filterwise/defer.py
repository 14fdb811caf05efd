"""Deferral: the normalization runs once an optimizer step, not once a micro-batch."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from filterwise import host
from filterwise.errors import FilterwiseWarning
from filterwise.kept import Kept, Window, can_keep, fill, watch_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from filterwise.kept import Mode

__all__ = ["defer", "keep_weights"]

WINDOW = "_filterwise_window"
TOLD = "_filterwise_told"


@contextmanager
def defer(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Gather a micro-batch's gradients on the kept weights, as `no_sync` does with DDP's.

    Around each micro-batch's forward and backward but the last::

        for i, micro_batch in enumerate(step):
            with fw.defer(model, enabled=i < len(step) - 1):
                loss(model(micro_batch)).backward()
        optimizer.step()

    Effective weights are computed once, in one call for all layers; the micro-batches' gradients
    with respect to them are added up, and the sum goes through the normalization's backward once,
    in the first backward outside. That is exact: the backward is linear in the gradient while the
    raw weights stay. Parameters get the gradients that they would have got, and hooks on them fire
    once, in that last backward.

    Contexts nest, and each puts back what it found. Leaving ``enabled=False`` hands over whatever
    is left. An exception drops nothing: what was gathered stays, as it would in ``.grad``.

    Args:
        model: A model with converted layers, a part of one, a plain model (nothing happens), or
            one wrapped in DDP, whose `no_sync` is then entered too.
        enabled: False for the last micro-batch of a step.

    Raises:
        DeferralError: By the next forward, if a raw weight or gain has changed while gradients were
            gathered on it; by an optimizer's step, if its parameters still have a sum to come.

    What cannot be seen: a write through ``.data`` or numpy between two micro-batches of a window.
    EquiNorm depends on the micro-batch and takes no part; shards of FSDP take none either; both are
    said once. Under ``torch.compile`` layers compute in the graph, as without deferral.
    """
    with ExitStack() as stack:
        inner = model
        if isinstance(model, DistributedDataParallel):
            inner = model.module
            if enabled:
                stack.enter_context(model.no_sync())
        watch_steps()
        window = inner.__dict__.setdefault(WINDOW, Window())
        layers = _deferrable(inner)
        before = [(kept, kept.mode, kept.window) for _, kept in layers]
        mode: Mode = "defer" if enabled else "hand over"
        try:
            for _, kept in layers:
                kept.mode = mode
                kept.window = window if kept.gathered() is None else kept.window
            _fill_stale(layers)
            yield
            if not enabled:
                window.close()
        finally:
            for kept, former, old in before:
                kept.mode = former
                if kept.gathered() is None:
                    kept.window = old


def keep_weights(model: nn.Module, enabled: bool) -> None:
    """Switch the keeping of effective weights in evaluation on (the default) or off for a model.

    On, a forward without gradient in evaluation mode keeps each layer's effective weight until
    anything that it depends on changes; that costs one copy of the converted weights. Off, it is
    computed at every forward, and what was kept is freed. `defer` keeps weights either way.
    """
    for _, module in host.converted(model):
        state = host.state_of(module)
        state.keeps = enabled
        if not enabled:
            state.forget()


def _deferrable(model: nn.Module) -> list[tuple[nn.Module, Kept]]:
    """Return the layers that take part, with what they keep; say once which ones cannot."""
    found, aside = [], []
    owners: dict[int, Kept] = {}
    for name, module in host.converted(model):
        state = host.state_of(module)
        tensors = host.inputs_of(module)
        if state.method.uses_input or not can_keep(tensors):
            aside.append((name, state.method.uses_input))
            continue
        if state.kept is None:
            state.kept = Kept(state)
        kept = state.kept
        kept.label = name or type(module).__name__
        other = owners.setdefault(id(tensors[0]), kept)
        if other is not kept:
            other.tied = kept.tied = True
        found.append((module, kept))
    if aside and not torch.compiler.is_compiling() and TOLD not in model.__dict__:
        model.__dict__[TOLD] = True
        name, by_input = aside[0]
        reason = "EquiNorm depends on the micro-batch" if by_input else "its weight is a shard"
        warnings.warn(
            f"{len(aside)} converted layers take no part in deferral and compute as ever (first:"
            f" {name}; {reason}).",
            FilterwiseWarning,
            stacklevel=4,
        )
    return found


def _fill_stale(layers: list[tuple[nn.Module, Any]]) -> None:
    if not torch.is_grad_enabled():
        return
    stale = []
    for module, kept in layers:
        tensors = host.inputs_of(module)
        if kept.gathered() is None and not kept.is_fresh(tensors):
            stale.append((kept, tensors))
    fill(stale)
