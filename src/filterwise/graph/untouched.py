"""Running a model's code and leaving no trace of it in the model."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["random_states", "untouched"]

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a model's code without gradient, hooks, warnings, or a change that stays.

    Attributes of every module (the mode, tensors and lists that a forward stores) come back as they
    were, buffers are exchanged for copies meanwhile, and random states are restored.
    """
    modules = list(model.modules())
    attributes = [(module.__dict__, dict(module.__dict__)) for module in modules]
    contents = [
        (value, value.copy())
        for _, before in attributes
        for value in before.values()
        if isinstance(value, (dict, list, set))
    ]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(random_states(model))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.no_grad())
            copies: dict[Any, Any] = {}
            for module in modules:
                _prepare(module, copies)
            yield
    finally:
        for current, before in attributes:
            for name in current.keys() - before.keys():
                del current[name]
            current.update(before)
        for container, before in contents:
            _refill(container, before)


def _prepare(module: nn.Module, copies: dict[Any, Any]) -> None:
    """Take a module's hooks off, and put copies in place of its buffers; shared ones stay so."""
    for name in HOOKS:
        if name in module.__dict__:
            module.__dict__[name] = OrderedDict()
    if "_compiled_call_impl" in module.__dict__:
        module.__dict__["_compiled_call_impl"] = None
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = copies.setdefault(buffer, buffer.detach().clone())


def _refill(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
        return
    container.clear()
    container.update(before)


@contextlib.contextmanager
def random_states(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch (on the model's devices too), Python and numpy."""
    devices: dict[str, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type not in ("cpu", "meta"):
            devices.setdefault(tensor.device.type, set()).add(tensor.device.index or 0)
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for kind, indices in devices.items():
                fork = torch.random.fork_rng(devices=sorted(indices), device_type=kind)
                stack.enter_context(fork)
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
