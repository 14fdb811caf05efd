"""The method's options in a checkpoint's metadata, and what loading says about them.

``state_dict()._metadata[layer]["filterwise"]`` is a flat dictionary of the method's name, its
options and the library's version. It survives ``torch.save``, deepcopy and averaged copies; a
plain dictionary copy loses it.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from filterwise.errors import CheckpointWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from filterwise.methods.method import Method

__all__ = [
    "KEY",
    "add_load_hook",
    "compare_options",
    "options_record",
    "remove_load_hook",
    "write_options",
]

KEY = "filterwise"
PRESERVE = "preserve"
FORMAT = 1
WAY_OUT = ", another function: convert with what it was saved with to get the one saved"


def options_record(method: Method, preserve: bool = False) -> dict[str, str | float | int | bool]:
    """Return a method as a flat dictionary of strings and numbers.

    ``preserve`` is in it where a layer has gains or offsets that its method does not.
    """
    record: dict[str, str | float | int | bool] = {"method": method.name, "format": FORMAT}
    for name, value in method.all_options().items():
        plain = isinstance(value, str | float | int)
        record[name] = value if plain else json.dumps(value)
    if preserve:
        record[PRESERVE] = True
    return record


def write_options(destination: Any, prefix: str, method: Method, preserve: bool = False) -> None:
    """Write a layer's options into the metadata of a state dictionary, if it has any."""
    metadata = getattr(destination, "_metadata", None)
    if metadata is not None:
        metadata.setdefault(prefix[:-1], {})[KEY] = options_record(method, preserve)


def compare_options(metadata: dict[str, Any], method: Method, preserve: bool = False) -> str | None:
    """Return what a checkpoint says of one layer, where that is not what the layer is.

    Args:
        metadata: The layer's entry, as torch hands it over while loading.
        method: What the layer computes.
        preserve: Whether it was converted with ``preserve=True``. One that was can hold what one
            that was not has saved: its gains and offsets start where they have no effect.
    """
    saved = metadata.get(KEY)
    if saved is not None:
        here = options_record(method)
        if saved.get(PRESERVE) and not preserve:
            return (
                "it was saved with gains or offsets of preserve=True, which the layer here cannot"
                " hold: convert with preserve=True, then load"
            )
        saved = {name: value for name, value in saved.items() if name != PRESERVE}
        if saved == here:
            return None
        if saved.get("method") != here["method"]:
            return (
                f"it was saved as {saved.get('method')} and is loaded into {method.name}{WAY_OUT}"
            )
        changed = [
            f"{name} {saved.get(name)} -> {here.get(name)}"
            for name in dict.fromkeys([*saved, *here])
            if saved.get(name) != here.get(name)
        ]
        text = ", ".join(changed)
        return f"it was saved as {method.name} with other options ({text}){WAY_OUT}"
    if "version" in metadata:
        changes = ", and the function changes: load it with a plain model to get the one saved"
        if method.starts_plain or preserve:
            changes = ", and computes what a plain layer would"
            changes += " in evaluation" if method.uses_input else ""
        return (
            "the checkpoint is a plain model's, or another library's, while the layer is converted"
            f" to {method}{changes}"
        )
    return (
        "the checkpoint has lost its metadata, so that its options are unknown: convert with those"
        " that it was saved with"
    )


def add_load_hook(model: nn.Module) -> None:
    """Let a converted model say, once a load, where a checkpoint's options differ.

    A part of it says so too, if it is loaded by itself.
    """
    model.register_load_state_dict_post_hook(_say_what_differs)
    parts = dict.fromkeys(
        part
        for name, module in model.named_modules()
        if "_filterwise" in module.__dict__
        for part in _ancestors(model, name)
    )
    for part in parts:
        if part is not model:
            part.register_load_state_dict_post_hook(_say_of_a_part)


def _ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the module of that name and all that it lies in."""
    words = name.split(".")
    for length in range(len(words) + 1):
        yield model.get_submodule(".".join(words[:length]))


def remove_load_hook(model: nn.Module) -> None:
    """Take that hook off again, also from a copy of the model."""
    for module in model.modules():
        hooks = module._load_state_dict_post_hooks
        for key in [
            key for key, hook in hooks.items() if hook in (_say_what_differs, _say_of_a_part)
        ]:
            del hooks[key]


def _say_of_a_part(part: nn.Module, incompatible_keys: object) -> None:
    """Speak where a part was loaded by itself: its layers were then loaded under their names."""
    del incompatible_keys
    for name, module in part.named_modules():
        state = module.__dict__.get("_filterwise")
        if state is not None and state.loaded:
            if state.loaded_as == (f"{name}." if name else ""):
                _say(part)
            return


def _say_what_differs(model: nn.Module, incompatible_keys: object) -> None:
    del incompatible_keys
    _say(model)


def _say(model: nn.Module) -> None:
    found: dict[str, list[str]] = {}
    absent: dict[str, None] = {}
    layers = 0
    for name, module in model.named_modules():
        state = module.__dict__.get("_filterwise")
        if state is None:
            continue
        layers += 1
        if state.loaded:
            found.setdefault(state.loaded, []).append(name or type(module).__name__)
            absent |= dict.fromkeys(state.absent)
        state.loaded, state.absent = None, ()
    if not found:
        return
    words = [
        f"{names[0]}: {what}. The same holds for {len(names)} of {layers} converted layers."
        for what, names in found.items()
    ]
    if absent:
        words.append(f"The checkpoint has no {', '.join(absent)}: initial values were taken.")
    words.append("Raw weights were loaded as they are.")
    warnings.warn(" ".join(words), CheckpointWarning, stacklevel=5)
