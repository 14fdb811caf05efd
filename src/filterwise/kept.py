"""Kept weights: effective weights held between forwards, and what micro-batches gather on them.

A layer keeps its effective weight in two cases only: in evaluation without gradient, between
forwards; and in a *window* of `defer`, over the micro-batches of one optimizer step. A kept weight
is used only while everything that it was computed from is what it was: identity, version, address,
dtype and device of each tensor, and the number of optimizer steps so far, since fused optimizers
move no version.

In a window a deferred micro-batch computes with a leaf that shares the kept weight's storage, so
autograd gathers the gradient there. The first backward outside `defer` goes through a node that
takes what was gathered along, once.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from filterwise import kernel as kernels
from filterwise.errors import DeferralError
from filterwise.kernel import Layer
from filterwise.methods.equinorm import EquilibriumNormalization
from filterwise.methods.method import WeightMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from filterwise.host import HostState
    from filterwise.kernel import Kernel

Mode = Literal["ordinary", "defer", "hand over"]

__all__ = [
    "Kept",
    "Window",
    "at_rest",
    "can_keep",
    "fill",
    "in_window",
    "roles",
    "watch_steps",
]


class Window:
    """The micro-batches of one optimizer step: the layers that gathered, until they hand over."""

    opened: ClassVar[weakref.WeakSet[Window]] = weakref.WeakSet()

    def __init__(self) -> None:
        """Open with the first layer that joins."""
        self.layers: list[Kept] = []
        self.closing = False

    def __reduce__(self) -> tuple[type[Window], tuple[()]]:
        """A copy of a model has a window of its own, in which nothing was gathered."""
        return Window, ()

    def join(self, layer: Kept) -> None:
        """Take in a layer that has begun to gather."""
        self.layers.append(layer)
        Window.opened.add(self)

    def close(self) -> None:
        """Hand over what no backward has picked up, through autograd, so that hooks fire."""
        self.closing = False
        left, self.layers = self.layers, []
        Window.opened.discard(self)
        for layer in left:
            layer.hand_over_alone()

    def close_after_backward(self) -> None:
        """Close when the backward that is running ends."""
        if not self.closing:
            self.closing = True
            engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
            engine.queue_callback(self.close)


class _Steps:
    count = 0
    watched = False


def watch_steps() -> None:
    """Count every step of every torch optimizer from now on, and guard it against a lost sum."""
    if not _Steps.watched:
        _Steps.watched = True
        register_optimizer_step_pre_hook(_refuse_to_lose_a_sum)
        register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    _Steps.count += 1


def _refuse_to_lose_a_sum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not Window.opened:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for window in list(Window.opened):
        for layer in window.layers:
            owned = {id(tensor) for tensor in layer.gathered_from}
            if layer.gathered() is not None and stepped & owned:
                raise DeferralError(
                    f"an optimizer step while {layer.label} holds the gathered gradient of"
                    f" {layer.backwards} micro-batches: every micro-batch since the last step was"
                    " deferred. Run the last one outside defer(model), or close the window with"
                    " `with defer(model, enabled=False): pass` before clipping (under DDP only the"
                    " former is reduced over processes). No parameter has moved."
                )


class Kept:
    """One layer's kept weight, and the gradient that micro-batches gathered on it.

    Attributes:
        label: The layer's dotted name, for messages.
        mode: What a forward with gradient does: as ever, gather, or hand over.
        window: The window that it gathers in.
        backwards: How many backward passes have been gathered.
        gathered_from: The tensors that the gathered gradient belongs to.
        tied: Whether another layer has the same raw weight.
    """

    def __init__(self, state: HostState) -> None:
        """Keep nothing yet."""
        self.state = state
        self.label = "a layer"
        self.mode: Mode = "ordinary"
        self.window: Window | None = None
        self.buffer: Tensor | None = None
        self.leaf: Tensor | None = None
        self.statistics: Any = None
        self.stamp: tuple[Any, ...] | None = None
        self.tensors: tuple[Tensor, ...] = ()
        self.backwards = 0
        self.gathered_from: tuple[Tensor, ...] = ()
        self.gathered_stamp: tuple[Any, ...] | None = None
        self.tied = False
        self.shown: Tensor | None = None
        self.guard: Any = None
        self.seen: tuple[Tensor, int] | None = None

    def is_fresh(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether the kept weight is what these tensors give."""
        return self.stamp is not None and _same(self.stamp, self.tensors, tensors)

    def gathered(self) -> Tensor | None:
        """Return the gathered gradient; None if there is none, or `zero_grad` has dropped it."""
        if self.leaf is None or self.leaf.grad is None:
            return None
        shown = self.gathered_from[0].grad
        if shown is None or self._was_zeroed(shown):
            self.drop()
            return None
        return self.leaf.grad

    def _was_zeroed(self, shown: Tensor) -> bool:
        """Tell whether the raw weight's gradient was zeroed since the last deferred backward."""
        if self.seen is None or self.leaf is None or shown is self.leaf.grad:
            return False
        return self.seen != (shown, shown._version) and not bool(shown.any())

    def gather(self, leaf: Tensor) -> None:
        """Note that a deferred backward has added to the leaf; autograd calls this.

        Where the raw weight has no gradient it is shown the gathered one, so that both kinds of
        `zero_grad` reach it; where the dtypes agree it is the same tensor and costs nothing.
        """
        assert leaf.grad is not None
        if self.backwards == 0:
            self.gathered_from, self.gathered_stamp = self.tensors, self.stamp
            if self.window is not None:
                self.window.join(self)
        self.backwards += 1
        weight = self.gathered_from[0]
        if weight.grad is None or weight.grad is self.shown:
            self._show(weight, leaf.grad)
        else:
            self.seen = (weight.grad, weight.grad._version)

    def _show(self, weight: Tensor, gathered: Tensor) -> None:
        same = weight.dtype == gathered.dtype
        shown = gathered if same else gathered.to(weight.dtype)
        weight.grad = self.shown = shown
        self.seen = (shown, shown._version)
        if self.guard is None:
            self.guard = weight.register_hook(self._step_aside)

    def _step_aside(self, gradient: Tensor) -> None:
        """Let a gradient that reaches the raw weight by another way not be added to the sum."""
        del gradient
        if self.shown is not None and self.gathered_from[0].grad is self.shown:
            self.gathered_from[0].grad = None
            self.shown = self.seen = None

    def take(self) -> Tensor | None:
        """Return the gathered gradient, which then is the caller's, and forget it."""
        gathered = self.gathered()
        self.drop()
        return gathered

    def drop(self) -> None:
        """Forget what was gathered."""
        if self.leaf is not None:
            self.leaf.grad = None
        if self.guard is not None:
            self.guard.remove()
        weight = self.gathered_from[0] if self.gathered_from else None
        if weight is not None and self.shown is not None and weight.grad is self.shown:
            weight.grad = None
            if self.tied:
                self._hand_on(weight)
        self.shown = self.seen = self.guard = self.gathered_stamp = None
        self.gathered_from = ()
        self.backwards = 0

    def _hand_on(self, weight: Tensor) -> None:
        """Show the sum of another layer on the same raw weight, hidden behind this one's so far."""
        for other in self.window.layers if self.window is not None else ():
            sum_of_other = None if other.leaf is None else other.leaf.grad
            shares = other.gathered_from and other.gathered_from[0] is weight
            if other is not self and shares and sum_of_other is not None:
                other._show(weight, sum_of_other)
                return

    def hand_over_alone(self) -> None:
        """Bring the gathered gradient to the raw weight without another backward's help."""
        tensors = self.gathered_from
        gathered = self.take()
        if gathered is None:
            return
        with torch.enable_grad():
            weight = compute(self.state, tensors)
            torch.autograd.backward(weight, gathered.to(weight.dtype))

    @property
    def in_use(self) -> bool:
        """Whether a forward with gradient has to ask: in a window, or with a sum to hand over."""
        return self.mode != "ordinary" or self.gathered_stamp is not None

    def forget(self) -> bool:
        """Drop the kept weight; return whether anything else is left."""
        self.stamp = self.statistics = None
        self.tensors = ()
        if self.in_use:
            return True
        self.buffer = self.leaf = None
        return False

    def refuse_if_changed(self, tensors: Sequence[Tensor]) -> None:
        """Refuse to gather on a weight that is not the one that was gathered on before.

        Raises:
            DeferralError: If it has changed; what was gathered in the window is dropped.
        """
        if self.gathered() is None or self.gathered_stamp is None:
            return
        if _same(self.gathered_stamp, self.gathered_from, tensors):
            return
        backwards = self.backwards
        for layer in list(self.window.layers) if self.window is not None else [self]:
            layer.drop()
        raise DeferralError(
            f"{self.label}.{self.state.parameter} changed inside defer(model) (after {backwards}"
            " micro-batches): their gradients belong to a weight that is gone. Step the optimizer"
            f" after the window, or leave {self.label} out with exclude=. Gradients of this window"
            " were dropped; the next window starts clean."
        )


def roles(
    method: WeightMethod, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return raw weight, gain and offset from the tensors that enter an effective weight."""
    rest = list(tensors[1:])
    gain = rest.pop(0) if method.has_gain else None
    return tensors[0], gain, rest.pop(0) if method.has_offset else None


def compute(state: HostState, tensors: Sequence[Tensor]) -> Tensor:
    """Compute an effective weight the ordinary way, as part of the graph."""
    method = state.method
    if isinstance(method, EquilibriumNormalization):
        weight, *rest = tensors
        gain = rest.pop(0) if method.has_gain else None
        factor = rest[2] if len(rest) > 2 else 1.0
        return method.effective(weight, rest[0], gain, geometry_factor=factor)
    assert isinstance(method, WeightMethod)
    weight, gain, offset = roles(method, tensors)
    return method.effective(weight, state.layout, gain, offset, state.kernel)


def can_keep(tensors: Sequence[Tensor]) -> bool:
    """Tell whether an effective weight of these may be kept.

    Not where the raw weight is no parameter of its own (pruned, passed in by `functional_call`, a
    shard or a replica), where a version cannot be read, or while something traces.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    weight = tensors[0]
    if type(weight) is not nn.Parameter or weight.is_meta:
        return False
    return not any(tensor.is_inference() for tensor in tensors)


def _stamp(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return (
        _Steps.count,
        *((t._version, t.data_ptr(), t.dtype, t.device, t.requires_grad) for t in tensors),
    )


def _same(stamp: tuple[Any, ...], before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return all(a is b for a, b in zip(before, now, strict=True)) and stamp == _stamp(now)


def fill(layers: Sequence[tuple[Kept, Sequence[Tensor]]]) -> None:
    """Compute kept weights: one kernel call for all layers of a device and kernel."""
    calls: dict[tuple[Kernel, torch.device], list[tuple[Kept, Sequence[Tensor], Layer]]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for kept, tensors in layers:
            _make_buffer(kept, tensors)
            method = kept.state.method
            if not isinstance(method, WeightMethod) or method.cells:
                assert kept.buffer is not None
                kept.buffer.copy_(compute(kept.state, tensors))
                continue
            layout = kept.state.layout
            family = method.family(layout.fan_in(tensors[0].shape))
            layer = Layer(tensors[0], family, layout, *roles(method, tensors)[1:])
            key = (kept.state.kernel, tensors[0].device)
            calls.setdefault(key, []).append((kept, tensors, layer))
        for (kernel, _), group in calls.items():
            buffers = [kept.buffer for kept, _, _ in group if kept.buffer is not None]
            saved = kernels.forward([layer for _, _, layer in group], buffers, kernel)
            for (kept, _, _), statistics in zip(group, saved, strict=True):
                kept.statistics = statistics
    for kept, tensors in layers:
        kept.tensors, kept.stamp = tuple(tensors), _stamp(tensors)


def _make_buffer(kept: Kept, tensors: Sequence[Tensor]) -> None:
    """Make the buffer and its leaf, at least float32, where the ones there are do not suit."""
    weight = tensors[0]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    buffer = kept.buffer
    suits = (
        buffer is not None
        and buffer.shape == weight.shape
        and (buffer.dtype, buffer.device) == (dtype, weight.device)
    )
    if not suits:
        kept.buffer = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        kept.leaf = kept.buffer.detach().requires_grad_()
        kept.leaf.register_post_accumulate_grad_hook(kept.gather)


def at_rest(kept: Kept, tensors: Sequence[Tensor]) -> Tensor:
    """Return the kept weight for a forward without gradient, computed anew if it is stale."""
    if not kept.is_fresh(tensors):
        fill([(kept, tensors)])
    assert kept.buffer is not None
    return kept.buffer.to(tensors[0].dtype)


def in_window(kept: Kept, tensors: Sequence[Tensor]) -> Tensor | None:
    """Return what a forward with gradient computes with; None asks for the ordinary way.

    Raises:
        DeferralError: If gradients were gathered on a weight that has changed since.
    """
    kept.refuse_if_changed(tensors)
    if kept.mode == "ordinary" and kept.gathered() is None:
        return None
    weight = tensors[0]
    if kept.mode == "defer" and not weight.requires_grad:
        return None
    if not kept.is_fresh(tensors):
        fill([(kept, tensors)])
    assert kept.leaf is not None
    if kept.mode == "defer":
        return kept.leaf.to(weight.dtype)
    return _HandOver.apply(kept, *tensors)


class _HandOver(torch.autograd.Function):
    """The kept weight as a function of raw weight and gain, whose backward takes the sum along."""

    @staticmethod
    def forward(ctx: Any, kept: Kept, *tensors: Tensor) -> Tensor:
        assert kept.buffer is not None
        ctx.kept, ctx.statistics = kept, kept.statistics
        ctx.save_for_backward(*tensors)
        return kept.buffer.detach().to(tensors[0].dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept: Kept = ctx.kept
        tensors = ctx.saved_tensors
        gradient, owned = gradients[0], kept.take()
        window = kept.window
        if window is not None and window in Window.opened:
            window.close_after_backward()
        if owned is not None:
            gradient = owned.add_(gradient) if not torch.is_grad_enabled() else owned + gradient
        if torch.is_grad_enabled() or ctx.statistics is None:
            return None, *_differentiate(kept, tensors, gradient)
        state = kept.state
        method = state.method
        assert isinstance(method, WeightMethod)
        family = method.family(state.layout.fan_in(tensors[0].shape))
        layer = Layer(tensors[0], family, state.layout, *roles(method, tensors)[1:])
        found = kernels.backward(
            [layer], [ctx.statistics], [gradient], state.kernel, in_place=owned is not None
        )[0]
        return None, *[one for one in found if one is not None]


def _differentiate(
    kept: Kept, tensors: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Go back the ordinary way: for a second derivative, and for methods outside the family."""
    second = torch.is_grad_enabled()
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    with torch.enable_grad():
        weight = compute(kept.state, tensors)
        found = torch.autograd.grad(
            weight, wanted, gradient.to(weight.dtype), create_graph=second, allow_unused=True
        )
    by_id = dict(zip(map(id, wanted), found, strict=True))
    return tuple(by_id.get(id(tensor)) for tensor in tensors)
