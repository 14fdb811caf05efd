"""Methods by which a module merges its norms into its weights are refused on converted layers.

LeViT's ``fuse``, MobileOne's ``reparameterize``, RepVGG's ``switch_to_deploy`` and their like read
``.weight``, multiply it with the BatchNorm's scale and write it into a plain layer. Of a converted
layer that is the raw weight, so the result would silently be another network.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from filterwise.errors import ConversionError
from filterwise.host import converted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

__all__ = ["guard", "unguard", "unguarded"]

MERGERS = ("fuse", "fuse_model", "reparameterize", "switch_to_deploy")


def guard(model: nn.Module, undo: list[Callable[[], None]] | None = None) -> None:
    """Let such methods of every module that holds a converted layer raise, until `unguard`.

    Args:
        model: A model with converted layers.
        undo: Collects how to take each guard off again.
    """
    for name, module, method in unguarded(model):
        label = f"{name or 'the model'} ({type(module).__name__})"
        module.__dict__[method] = partial(_refuse, label, method)
        if undo is not None:
            undo.append(partial(module.__dict__.pop, method, None))


def unguard(model: nn.Module) -> None:
    """Give modules their own methods back."""
    for module in model.modules():
        for method in MERGERS:
            guarding = module.__dict__.get(method)
            if isinstance(guarding, partial) and guarding.func is _refuse:
                del module.__dict__[method]


def unguarded(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, module and method wherever a module around converted layers could merge them."""
    holders = {name[:end] if end > 0 else "" for name, _ in converted(model) for end in _ends(name)}
    for name, module in model.named_modules():
        if name not in holders:
            continue
        for method in MERGERS:
            own = getattr(type(module), method, None)
            if method not in module.__dict__ and inspect.isfunction(own) and _takes_nothing(own):
                yield name, module, method


def _ends(name: str) -> Iterator[int]:
    """Yield where the names of all modules around one end."""
    yield 0
    for place, letter in enumerate(name):
        if letter == ".":
            yield place


def _takes_nothing(method: Callable[..., Any]) -> bool:
    """Tell a method that can be called without arguments; one that fuses features takes them."""
    first, *others = inspect.signature(method).parameters.values()
    del first
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(one.default is not one.empty or one.kind in kinds for one in others)


def _refuse(label: str, method: str, *_: Any, **__: Any) -> NoReturn:
    raise ConversionError(
        f"{label}.{method}() would merge norms into the raw weights of converted layers, which are"
        " not what these compute with. Call fold(model) first; the folded model can be merged. The"
        " model is unchanged."
    )
