"""Hooks that see forwards and gradients of effective weights, and change neither.

Nothing is registered on raw parameters: `defer` and DDP look at hooks there, and would go another
way.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from filterwise.diagnose.layers import as_wide
from filterwise.host import state_of
from filterwise.kernel.function import is_watched

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from filterwise.diagnose.layers import Layer

__all__ = ["EffectiveGradients", "ForwardHook", "in_backward"]


def in_backward() -> bool:
    """Tell whether a backward pass is running: forwards in it are repeated for a checkpoint."""
    return torch._C._current_graph_task_id() != -1


class ForwardHook:
    """A forward hook that copies and pickles of the model do not take along."""

    def __init__(self, see: Callable[..., None] | None) -> None:
        """Call `see` with module, arguments, keywords and output."""
        self._see = see

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Let it see."""
        if self._see is not None:
            self._see(module, args, kwargs, output)

    def __deepcopy__(self, memo: object) -> ForwardHook:
        """Return a hook that does nothing."""
        return ForwardHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Likewise."""
        return ForwardHook, (None,)


class EffectiveGradients:
    """The gradient of each converted layer's effective weight, added up over a step's backwards.

    Inside `defer` micro-batches meet one leaf, outside every forward has a tensor of its own.
    Either way what the backward pass brings to the effective weight is seen before it goes on.
    """

    def __init__(self, layers: list[Layer]) -> None:
        """Watch the converted ones of these layers from `start` on."""
        self.sums: dict[str, Tensor] = {}
        self._layers = [layer for layer in layers if layer.is_converted]
        self._handles: list[Any] = []
        self._met: dict[int, weakref.ref[Tensor]] = {}
        self._task: dict[str, int] = {}

    def start(self) -> None:
        """Begin a step."""
        for layer in self._layers:
            state_of(layer.module).watcher = partial(self._meet, layer)

    def stop(self) -> None:
        """End it, and drop what was added up."""
        for layer in self._layers:
            state_of(layer.module).watcher = None
        for handle in self._handles:
            handle.remove()
        self.sums, self._handles, self._met, self._task = {}, [], {}, {}

    def _meet(self, layer: Layer, weight: Tensor) -> None:
        """Hook the tensor that a forward computes with, once."""
        if not torch.is_grad_enabled() or not weight.requires_grad or is_watched():
            return
        met = self._met.get(id(weight))
        if met is not None and met() is weight:
            return
        self._met[id(weight)] = weakref.ref(weight)
        self._handles.append(weight.register_hook(partial(self._gather, layer)))

    def _gather(self, layer: Layer, gradient: Tensor) -> None:
        name, task = layer.name, torch._C._current_graph_task_id()
        with torch.no_grad():
            # A raw weight without gradient has none gathered: zero_grad, or a step that a
            # GradScaler left out, came in between.
            if self._task.get(name) != task and layer.weight.grad is None:
                self.sums.pop(name, None)
            self._task[name] = task
            before = self.sums.get(name)
            values = as_wide(gradient.detach())
            # The engine may add to this tensor in place, so it is copied.
            self.sums[name] = values.clone() if before is None else before.add_(values)
