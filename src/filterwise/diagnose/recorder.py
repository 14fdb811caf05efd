"""The recorder: watches a model while it trains, and records signals every few steps."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from filterwise.diagnose.activation_signals import Activations, gathered
from filterwise.diagnose.gradient_signals import Gradients
from filterwise.diagnose.layers import chosen_layers, inner, refuse
from filterwise.diagnose.observing import EffectiveGradients, ForwardHook, in_backward
from filterwise.diagnose.signal import chosen
from filterwise.diagnose.signals import SIGNALS
from filterwise.diagnose.trace import Trace, as_records
from filterwise.diagnose.weight_signals import Weights, angle
from filterwise.errors import DeferralError
from filterwise.host import state_of
from filterwise.keeping import watch_steps

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from filterwise.diagnose.layers import Layer, Layers
    from filterwise.diagnose.trace import Found

__all__ = ["record", "weights"]


def record(
    model: nn.Module,
    *,
    signals: str | Iterable[str] | None = None,
    every: int = 1,
    layers: Layers | None = None,
) -> AbstractContextManager[Trace]:
    """Record signals of a model while it trains, and change nothing: the run is the same bits.

    ::

        with fw.diagnose.record(model, every=100) as trace:
            train(model)
        trace.records()

    A step is one step of a torch optimizer that holds the model's parameters (of several, of the
    one that steps first). Its weights are those before the update; its gradients are of the whole
    step, whatever it was cut into: accumulated or deferred micro-batches, and processes; its
    activations are of all forwards since the step before, in the mode (training or evaluation) that
    the model was in on entering. A step that a `GradScaler` leaves out is no step; its forwards
    count to the next. On leaving, what has run since the last step is recorded as one more; so
    without an optimizer the context records one step, and `Trace.step` closes more of them.

    With DDP give the wrapper, and enter in every process: activations are merged and gradients
    averaged over processes, and every process has the same records. EquiNorm's effective weight is
    the one by its running means.

    Cost: nothing at steps that are not recorded. At a recorded one each signal costs what
    `signals` says of it; ``benchmarks/diagnose.py`` measures their share of a step. Values are
    brought to the CPU once a step.

    Args:
        model: Any model: plain, converted, under autocast, or a DDP wrapper.
        signals: Names of signals or of groups (``"weights"``, ``"gradients"``, ``"activations"``).
            None takes the default ones; `signals` lists all.
        every: Record one step of so many, the first one included.
        layers: Shell pattern on the dotted name, a list of them, or a predicate
            ``(name, module) -> bool``. None takes every convolution, linear and converted layer.

    Returns:
        A context manager that gives a `Trace`.

    Raises:
        ValueError: If the model is compiled, scripted, sharded or has no values yet, a name is
            unknown, or `every` is below 1.
        DeferralError: On entering, if micro-batches of a step are gathered already, whose gradients
            nobody has seen.
    """
    return _Recorder(model, signals, every, layers)


def weights(
    model: nn.Module,
    *,
    signals: str | Iterable[str] = "weights",
    layers: Layers | None = None,
    lr: float | None = None,
) -> list[dict[str, Any]]:
    """Return the signals of a model's weights as they are, as records of step 0.

    Cost: what `signals` says of each; no forward is run.

    Args:
        model: Any model, or a DDP wrapper.
        signals: Names of signals of the group ``weights``.
        layers: As in `record`.
        lr: Learning rate for ``effective_learning_rate``.

    Raises:
        ValueError: If a name is unknown or of another group, or the model is sharded or has no
            values yet.
    """
    root, _ = inner(model)
    refuse(root)
    wanted = chosen(SIGNALS, signals)
    for one in wanted:
        if one.info.group != "weights":
            raise ValueError(
                f"{one.info.name} is a signal of the {one.info.group}, which need a forward or a"
                " backward; use record(model)."
            )
    found: list[Found] = []
    for layer in chosen_layers(root, layers):
        view = Weights(layer, lr)
        for one in wanted:
            value = one.compute(view)
            if value is not None:
                found.append((layer.name, one.info.name, value))
    return as_records(found)


class _Recorder(AbstractContextManager["Trace"]):
    def __init__(self, model: nn.Module, signals: Any, every: int, layers: Any) -> None:
        self._root, wrapper = inner(model)
        refuse(self._root)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number >= 1, got {every!r}")
        self._group: Any = None if wrapper is None else wrapper.process_group
        self._every = every
        self._signals = chosen(SIGNALS, signals)
        self._names = {one.info.name for one in self._signals}
        self._groups = {one.info.group for one in self._signals}
        self._layers = chosen_layers(self._root, layers)
        self._shaped = [one for one in self._layers if one.inputs is not None]
        self._trace = Trace(self._close_by_hand)
        self._step = 0
        self._open = self._recording = self._dirty = False
        self._handles: list[Any] = []
        self._watching: list[Any] = []
        self._seen: dict[str, Activations] = {}
        self._gradients = EffectiveGradients(self._layers if "gradients" in self._groups else [])
        self._owners: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._leader: weakref.ref[Optimizer] | None = None
        self._found: list[Found] | None = None
        self._before: dict[str, Tensor] = {}

    def __enter__(self) -> Trace:
        if self._open:
            raise RuntimeError("a recorder is entered once; make another with record(model)")
        if "gradients" in self._groups:
            self._refuse_gathered("recording began")
        # Its guard against unfinished windows must come before ours.
        watch_steps()
        self._open, self._training = True, self._root.training
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._begin()
        return self._trace

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._recording and (self._dirty or not self._trace.steps()):
                self._take_rest()
        finally:
            self._end()
            self._trace.end()
            for handle in self._handles:
                handle.remove()

    def _take_rest(self) -> None:
        """Record what has run since the last step."""
        gradients = True
        if "gradients" in self._groups:
            try:
                self._refuse_gathered("recording ended")
            except DeferralError as error:
                gradients = False
                self._trace.note(f"step {self._step} has no signals of gradients: {error}")
        self._trace.add(self._step, self._take(None, gradients=gradients))

    def _refuse_gathered(self, when: str) -> None:
        for layer in self._layers:
            keeper = state_of(layer.module).keeper if layer.is_converted else None
            kept = None if keeper is None else keeper.gathering
            if kept is not None and kept.gathered() is not None:
                raise DeferralError(
                    f"{when} while {layer.name} holds the gathered gradient of {kept.backwards}"
                    " deferred micro-batches: what lies in .grad is the gradient of the effective"
                    " weight, not of the raw one. Run the last micro-batch outside defer(model)"
                    " first. Nothing was changed."
                )

    def _begin(self) -> None:
        """Start a step: put hooks in place if it is to be recorded."""
        self._recording = self._step % self._every == 0
        self._dirty = False
        if not self._recording:
            return
        hook = ForwardHook(self._notice)
        self._watching = [self._root.register_forward_hook(hook, with_kwargs=True)]
        if "activations" in self._groups:
            histograms = "channel_histogram" in self._names
            for layer in self._shaped:
                seen = Activations(layer, histograms=histograms, process_group=self._group)
                self._seen[layer.name] = seen
                hook = ForwardHook(self._seeing(seen))
                self._watching.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        self._gradients.start()

    def _end(self) -> None:
        """Take the hooks off and drop what they have seen."""
        for handle in self._watching:
            handle.remove()
        self._gradients.stop()
        self._watching, self._seen, self._before, self._found = [], {}, {}, None

    def _notice(self, *_: object) -> None:
        self._dirty = True

    def _seeing(self, seen: Activations) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            del module
            if self._root.training is not self._training or in_backward():
                return
            input = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(input, torch.Tensor) and isinstance(output, torch.Tensor):
                self._dirty = True
                with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                    seen.add(input, output)

        return see

    # Steps -----------------------------------------------------------------------------------

    def _owns(self, optimizer: Optimizer) -> bool:
        known = self._owners.get(optimizer)
        if known is None:
            own = {id(parameter) for parameter in self._root.parameters()}
            known = any(id(p) in own for group in optimizer.param_groups for p in group["params"])
            self._owners[optimizer] = known
        return known

    def _leads(self, optimizer: Optimizer) -> bool:
        if not self._owns(optimizer):
            return False
        leader = None if self._leader is None else self._leader()
        if leader is None:
            self._leader = weakref.ref(optimizer)
            return True
        return leader is optimizer

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._leads(optimizer) or not self._recording:
            return None
        # A closure computes the gradients inside the step.
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._following(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._following(kwargs["closure"])}
        self._before_update()
        return None

    def _following(self, closure: Any) -> Any:
        def run() -> Any:
            loss = closure()
            if self._found is None:
                self._before_update()
            return loss

        return run

    def _before_update(self) -> None:
        self._found = self._take(self._rates())

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._leads(optimizer):
            return
        if self._recording:
            found = self._found or []
            for layer in self._layers:
                before = self._before.get(layer.name)
                if before is not None:
                    turned = angle(before, layer.effective())
                    found.append((layer.name, "weight_turn", turned))
            self._trace.add(self._step, found)
        self._next()

    def _next(self) -> None:
        if self._recording:
            self._end()
        self._step += 1
        self._begin()

    def _close_by_hand(self, lr: float | None) -> None:
        if self._recording:
            if "gradients" in self._groups:
                self._refuse_gathered("a step was closed by hand")
            rates = None if lr is None else dict.fromkeys(map(id, self._root.parameters()), lr)
            self._trace.add(self._step, self._take(rates))
        self._next()

    def _rates(self) -> dict[int, float]:
        return {
            id(parameter): float(group["lr"])
            for optimizer in self._owners
            for group in optimizer.param_groups
            if "lr" in group
            for parameter in group["params"]
        }

    # Values ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, rates: dict[int, float] | None, *, gradients: bool = True) -> list[Found]:
        """Compute all signals of the step as it stands."""
        effective = self._reduced_gradients()
        if self._group is not None:
            self._reduce_activations()
        found: list[Found] = []
        for layer in self._layers:
            lr = None if rates is None else rates.get(id(layer.weight))
            before = None
            if "weight_turn" in self._names and rates is not None:
                before = layer.effective() if layer.is_converted else layer.matrix(layer.weight)
                self._before[layer.name] = before if layer.is_converted else before.clone()
            view = Weights(layer, lr, before)
            raw = layer.weight.grad if gradients else None
            sides: dict[str, Any] = {"weights": view, "activations": self._seen.get(layer.name)}
            if raw is not None:
                raw = layer.matrix(raw)
                hat = effective.get(layer.name) if layer.is_converted else raw
                sides["gradients"] = Gradients(view, raw, hat)
            found += self._of_layer(layer, sides)
        return found

    def _of_layer(self, layer: Layer, sides: dict[str, Any]) -> list[Found]:
        found: list[Found] = []
        for one in self._signals:
            side = sides.get(one.info.group)
            if side is None or (one.info.group == "activations" and not side.outputs.count):
                continue
            value = one.compute(side)
            if value is not None:
                found.append((layer.name, one.info.name, value))
        return found

    def _reduced_gradients(self) -> dict[str, Tensor]:
        """Return G of each converted layer as filter matrix, averaged over processes as DDP does.

        A process in which a layer was not used has zeros to give.
        """
        sums = self._gradients.sums
        watched = [one for one in self._layers if one.is_converted and "gradients" in self._groups]
        if self._group is not None and watched:
            size = distributed.get_world_size(self._group)
            for layer in watched:
                own = sums.get(layer.name)
                own = torch.zeros_like(layer.matrix(layer.weight)) if own is None else own
                own = layer.matrix(own) if own.shape == layer.weight.shape else own
                own = own.contiguous()
                distributed.all_reduce(own, group=self._group)
                sums[layer.name] = own / size
            return sums
        return {one.name: one.matrix(sums[one.name]) for one in watched if one.name in sums}

    def _reduce_activations(self) -> None:
        seen = list(self._seen.values())
        if not seen:
            return
        parts = [one.pack() for one in seen]
        rows = gathered(torch.cat(parts), self._group)
        for one, part in zip(seen, rows.split([len(part) for part in parts], 1), strict=True):
            one.unpack(part)
