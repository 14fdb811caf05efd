"""The graph by one run: modules and torch functions are watched while tensors pass.

A tensor remembers the node that made it. Operations in place give the tensor, and every other view
of its memory, the node that wrote last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.weak import WeakTensorKeyDictionary

from filterwise.graph.nodes import Builder, Graph, leaves
from filterwise.graph.untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["observe"]


def observe(model: nn.Module, example_input: Any) -> Graph:
    """Run a model once and watch it.

    Args:
        model: The model; it is left as it was.
        example_input: Its input; a tuple holds the positional arguments, a mapping the named ones.

    Raises:
        Exception: Whatever the model raises. One that fails in training mode (a batch of one) is
            tried in evaluation mode before.
    """
    try:
        return _observe(model, example_input, evaluate=False)
    except Exception:
        if not model.training:
            raise
    return _observe(model, example_input, evaluate=True)


def _observe(model: nn.Module, example_input: Any, *, evaluate: bool) -> Graph:
    watch = _Watch(Builder(model))
    with untouched(model):
        if evaluate:
            model.eval()
        for module in leaves(model):
            module.__dict__["forward"] = watch.leaf(module, module.forward)
        given = _pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.detach().clone(), example_input
        )
        for tensor in _tensors(given):
            watch.remember(tensor, watch.builder.input())
        with watch:
            if isinstance(given, tuple):
                result = model(*given)
            else:
                result = model(**given) if isinstance(given, Mapping) else model(given)
        for place in watch.places(_tensors(result)):
            watch.builder.output(place)
    return watch.builder.graph()


class _Watch(TorchFunctionMode):
    """Sees every torch function outside leaf modules, and every call of a leaf module."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.builder = builder
        self._made: Any = WeakTensorKeyDictionary()
        self._written: dict[int, int] = {}
        self._inside_leaf = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if self._inside_leaf:
            return func(*args, **kwargs)
        taken = list(_tensors((args, kwargs)))
        with self._writes(taken) as written:
            result = func(*args, **kwargs)
        made = list(_tensors(result))
        if made or written:
            parameters = [tensor for tensor in taken if isinstance(tensor, nn.Parameter)]
            place = self.builder.operate(
                _name(func), self.places(taken), parameters, in_place=bool(written)
            )
            self._finish(made, written, place)
        return result

    def leaf(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward that adds a node for the module and hides what runs in it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside_leaf:
                return forward(*args, **kwargs)
            taken = list(_tensors((args, kwargs)))
            inputs = self.places(taken)
            self._inside_leaf = True
            try:
                with self._writes(taken) as written:
                    result = forward(*args, **kwargs)
            finally:
                self._inside_leaf = False
            self._finish(list(_tensors(result)), written, self.builder.call(module, inputs))
            return result

        return watched

    def places(self, tensors: Any) -> list[int]:
        """Return the nodes that tensors come from, each once."""
        with torch._C.DisableTorchFunction():
            found = dict.fromkeys(self._place(tensor) for tensor in tensors)
        return [place for place in found if place is not None]

    def remember(self, tensor: Tensor, place: int) -> None:
        """Note the node that made a tensor."""
        self._made[tensor] = place

    def _place(self, tensor: Tensor) -> int | None:
        made = self._made.get(tensor)
        if made is None:
            return None
        return max(made, self._written.get(_memory(tensor), -1))

    @contextlib.contextmanager
    def _writes(self, taken: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield a list that holds, afterwards, the tensors that were written to in place."""
        written: list[Tensor] = []
        before = [_version(tensor) for tensor in taken]
        yield written
        pairs = zip(taken, before, strict=True)
        written += [tensor for tensor, version in pairs if _version(tensor) != version]

    def _finish(self, made: list[Tensor], written: list[Tensor], place: int | None) -> None:
        with torch._C.DisableTorchFunction():
            for tensor in (*made, *written):
                if place is not None:
                    self.remember(tensor, place)
                elif not any(tensor is old for old in written):
                    self._made.pop(tensor, None)
            if place is not None:
                self._written.update((_memory(tensor), place) for tensor in written)


def _name(function: Any) -> str:
    """Return a function's name; that of a property where it is a property's getter."""
    name = getattr(function, "__name__", "")
    return getattr(function.__self__, "__name__", name) if name == "__get__" else name


def _version(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return -1 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int:
    """Return what all views of one memory have in common; 0 where there is none to write to."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors, tensors on meta
        return 0


def _tensors(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, and in objects that carry some."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth == 0 or isinstance(value, (str, bytes, int, float, type, nn.Module)):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif hasattr(value, "__dict__") and not callable(value):
        for item in list(vars(value).values()):
            yield from _tensors(item, depth - 2 if depth > 2 else 0)
