"""Deferral: the normalization runs once an optimizer step, not once a micro-batch."""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from filterwise import host
from filterwise.errors import FilterwiseWarning
from filterwise.keeping import Window, are_own, are_shared, watch_steps

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from filterwise.host import HostState
    from filterwise.keeping import Entry

    Home = dict[str, Any]

__all__ = ["defer", "keep_weights"]


def defer(model: nn.Module, enabled: bool = True) -> AbstractContextManager[None]:
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
    is left. An exception drops nothing: what was gathered stays, as it would in ``.grad``, and
    `zero_grad` of either kind drops it. Between micro-batches ``.grad`` of a raw weight is the
    gathered gradient, that of the effective weight: clip or rescale after the window.

    Args:
        model: A model with converted layers, a part of one, a plain model (nothing happens), or
            one wrapped in DDP, whose `no_sync` is then entered too.
        enabled: False for the last micro-batch of a step.

    Raises:
        DeferralError: By the next forward, if a raw weight or gain has changed, or a gathered
            gradient was rescaled; by ``backward(create_graph=True)`` inside; by an optimizer's
            step, if its parameters still have a sum to come.

    What cannot be seen: a write through ``.data`` or numpy between two micro-batches of a window.
    Ask for gradients inside by ``backward()``, not by `torch.autograd.grad` of raw weights, which
    are not part of the graph there. EquiNorm depends on the micro-batch and takes no part; weights
    sharded by FSDP take none either; both are said once. Under ``torch.compile`` layers compute in
    the graph, as without deferral.
    """
    return _Context(model, enabled)


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


class _Plan:
    """What `defer` knows of a model, so that it need not be looked through at every micro-batch."""

    def __init__(self) -> None:
        self.window = Window()
        self.states: list[HostState] = []
        self.wrappers: list[weakref.ref[DistributedDataParallel]] = []
        self.told = False
        self._tensors: list[tuple[Home, str, Tensor]] = []
        self._modules: list[tuple[Home, list[nn.Module | None]]] = []

    def remember(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Note which modules and tensors there are, and where they are found."""
        self._tensors = [found for module in layers for found in host.homes_of(module)]
        homes = [module._modules for module in model.modules() if module._modules]
        self._modules = [(home, list(home.values())) for home in homes]

    def is_current(self) -> bool:
        """Tell whether the model's modules and the layers' tensors are those that it knows."""
        for home, modules in self._modules:
            if list(home.values()) != modules:
                return False
        for home, name, tensor in self._tensors:  # noqa: SIM110 (twice as fast)
            if home.get(name) is not tensor:
                return False
        return True


# Nothing lies on the model itself, which may be plain and is the user's to copy and pickle.
_PLANS: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()


class _Context:
    """One `defer`; it can be entered again, also from within."""

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        self._model = model
        self._enabled = enabled
        self._left: list[tuple[Window, Entry, list[Any]]] = []

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return
        plan = _PLANS.get(self._model)
        if plan is not None:
            plan.window.end_if_dropped()
        if plan is None or (plan.window not in Window.opened and not plan.is_current()):
            plan = _look_through(self._model, plan)
        window = plan.window
        entered = self._enter_wrappers(plan) if plan.wrappers else []
        self._left.append(
            (window, window.enter("defer" if self._enabled else "hand over"), entered)
        )

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._left:
            return
        window, before, entered = self._left.pop()
        try:
            if not self._enabled and kind is None and Window.opened:
                elsewhere = [one.gathering for one in window.members if one.gathering is not None]
                window.close(kept for kept in elsewhere if kept.gathered() is not None)
        finally:
            window.leave(before)
            for context in reversed(entered):
                context.__exit__(None, None, None)

    def _enter_wrappers(self, plan: _Plan) -> list[Any]:
        """Enter `no_sync` of DDP: else it waits for gradients that come with the last backward."""
        entered = []
        for reference in plan.wrappers:
            wrapper = reference()
            if wrapper is None or not self._enabled:
                continue
            context = wrapper.no_sync()
            context.__enter__()
            entered.append(context)
            if wrapper.find_unused_parameters and not plan.window.at_end:
                close = partial(_close_before_synchronizing, weakref.ref(plan.window))
                plan.window.at_end.append(wrapper.register_forward_pre_hook(close).remove)
        return entered


def _close_before_synchronizing(
    window: weakref.ref[Window], wrapper: DistributedDataParallel, inputs: object
) -> None:
    """Hand over before DDP reduces the gradients of parameters that this forward will not use."""
    del inputs
    opened = window()
    if opened is not None and wrapper.require_backward_grad_sync and torch.is_grad_enabled():
        opened.close()


def _look_through(model: nn.Module, plan: _Plan | None) -> _Plan:
    """Find a model's layers, and put down what they consist of now."""
    layers, wrappers = _layers(model)
    if plan is None:
        plan = _Plan()
        if layers or wrappers:
            watch_steps()
            _PLANS[model] = plan
    states = [host.state_of(module) for module in layers]
    plan.wrappers = [weakref.ref(wrapper) for wrapper in wrappers]
    known = len(states) == len(plan.states) and all(map(_is, states, plan.states))
    names = {} if known else {id(module): name for name, module in host.converted(model)}
    plan.states = states
    members, aside = [], []
    for module, state in zip(layers, states, strict=True):
        tensors = host.inputs_of(module)
        if state.method.uses_input or state.sharded or not are_own(tensors) or are_shared(tensors):
            aside.append(module)
            continue
        keeper = host.keeper_of(module)
        keeper.belong_to(tensors)
        if not known:
            keeper.label = names[id(module)] or type(module).__name__
        members.append(keeper)
    plan.window.take(members)
    plan.remember(model, layers)
    if aside and not plan.told:
        plan.told = True
        first = next(name for name, module in host.converted(model) if module is aside[0])
        _tell(len(aside), first, aside[0])
    return plan


def _is(one: object, other: object) -> bool:
    return one is other


def _layers(model: nn.Module) -> tuple[list[nn.Module], list[DistributedDataParallel]]:
    """Return converted layers and DDP wrappers in registration order; faster than `modules()`."""
    layers, wrappers, seen = [], [], set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if host.is_converted(module):
            layers.append(module)
        children = module._modules
        if children:
            stack.extend(reversed(children.values()))
            if isinstance(module, DistributedDataParallel):
                wrappers.append(module)
    return layers, wrappers


def _tell(count: int, first: str, module: nn.Module) -> None:
    state = host.state_of(module)
    if state.method.uses_input:
        reason = "EquiNorm depends on the micro-batch"
    elif state.sharded:
        reason = "its weight is sharded"
    elif are_own(host.inputs_of(module)):
        reason = "its weight is in shared memory"
    else:
        reason = "its weight or gain is not a parameter of its own"
    many = "1 converted layer takes no part in deferral and computes as ever"
    if count > 1:
        many = f"{count} converted layers take no part in deferral and compute as ever"
    where = f"first: {first}; {reason}" if first else reason
    warnings.warn(f"{many} ({where}).", FilterwiseWarning, stacklevel=4)
