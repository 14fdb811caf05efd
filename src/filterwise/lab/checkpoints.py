"""Checkpoints as people have them: found in their files, fitted to a model, never unpickled."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import filterwise as fw
from filterwise.checkpoint import KEY, options_record
from filterwise.host import converted, state_of, weight_label
from filterwise.lab.errors import LabError, UsageError, reason
from filterwise.methods.registry import METHODS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["Checkpoint", "load", "prefix_of", "read"]

ENTRIES = ("state_dict", "model", "model_state_dict", "state", "net", "module", "weights")
"""Names under which training scripts put a model's state, the likeliest first."""

NAMED = 3


@dataclass
class Checkpoint:
    """A model's state from a file, and what the file says of its methods.

    Attributes:
        path: The file.
        state: Tensors by name.
        methods: Method by layer, as text (safetensors) or as its flat record (torch); None where
            the file says nothing.
        folded: Methods that were folded away, as a file of ``filterwise export`` says.
        notes: Sentences on what was chosen in it.
    """

    path: Path
    state: Mapping[str, Any]
    methods: dict[str, Any] | None
    folded: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(path: str, key: str | None = None) -> Checkpoint:
    """Read a checkpoint; code in it is never run.

    Args:
        path: A safetensors file, or one of `torch.save` (read with ``weights_only=True``).
        key: The entry that holds the model's state, where the file holds several things.

    Raises:
        UsageError: If there is no such file or entry, or no state in it.
        LabError: If it cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"there is no checkpoint {path}.")
    if file.suffix == ".safetensors":
        return _safetensors(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own text advises to run the code all the same.
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise LabError(f"{path} cannot be read as a checkpoint: it is none, or torn.") from None
        raise LabError(
            f"{path} holds more than tensors ({named[1]}), and code in it is not run; save"
            " model.state_dict() alone."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise LabError(f"{path} cannot be read as a checkpoint: {reason(error)[:300]}.") from None
    return _entry(file, loaded, key)


def _safetensors(file: Path) -> Checkpoint:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise LabError(
            f"{file} needs safetensors; install the extra with pip install 'filterwise[export]'."
        ) from None
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        texts = [json.loads(header.get(name, "null")) for name in (KEY, f"{KEY}_folded")]
    except (OSError, SafetensorError, ValueError) as error:
        raise LabError(f"{file} cannot be read as safetensors: {reason(error)}.") from None
    methods, folded = (one if isinstance(one, dict) else None for one in texts)
    return Checkpoint(file, state, methods, folded or {})


def _is_state(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and all(isinstance(one, torch.Tensor) for one in value.values())
    )


def _entry(file: Path, loaded: Any, key: str | None) -> Checkpoint:
    """Find the model's state in what a training script has saved."""
    if key is None and _is_state(loaded):
        return Checkpoint(file, loaded, _records(loaded))
    if not isinstance(loaded, dict):
        raise UsageError(f"{file} holds a {type(loaded).__name__}, not a model's state.")
    states = [str(name) for name, value in loaded.items() if _is_state(value)]
    listed = ", ".join(states) or "none"
    if key is not None and key not in states:
        raise UsageError(f"{file} has no state under {key!r}. States in it: {listed}.")
    if not states:
        raise UsageError(
            f"{file} holds no model's state, that is a dictionary of tensors by name. It holds:"
            f" {', '.join(map(str, list(loaded)[:9]))}."
        )
    chosen = key or next((name for name in ENTRIES if name in states), states[0])
    notes = []
    if key is None and len(states) > 1:
        others = ", ".join(name for name in states if name != chosen)
        notes.append(f"{file} also holds {others}; {chosen} was taken (--key chooses).")
    return Checkpoint(file, loaded[chosen], _records(loaded[chosen]), notes=notes)


def _records(state: Any) -> dict[str, Any] | None:
    """Return what the state's metadata says of the methods; None where it has none."""
    metadata = getattr(state, "_metadata", None)
    if not metadata:
        return None
    return {name: entry[KEY] for name, entry in metadata.items() if KEY in entry}


def load(model: nn.Module, checkpoint: Checkpoint, recipe: str) -> list[str]:
    """Load a checkpoint into a converted model, strictly, and return what is to be said of it.

    Prefixes that wrappers leave (``module.``, ``_orig_mod.``, ``model.``) are taken off.

    Raises:
        UsageError: If names or shapes do not fit, or the file says that it was trained with other
            methods than the model has.
    """
    expected = model.state_dict()
    prefix = prefix_of(expected, checkpoint.state)
    state: OrderedDict[str, Tensor] = OrderedDict(
        (name.removeprefix(prefix), value)
        for name, value in checkpoint.state.items()
        if name.startswith(prefix)
    )
    methods = checkpoint.methods
    if methods is not None:
        methods = {name.removeprefix(prefix): one for name, one in methods.items()}
    _compare_methods(model, checkpoint, methods, recipe)
    _compare_names(model, checkpoint, state, expected)
    metadata = getattr(checkpoint.state, "_metadata", None)
    if metadata is not None:
        inner = {
            name.removeprefix(prefix): entry
            for name, entry in metadata.items()
            if f"{name}.".startswith(prefix)
        }
        state._metadata = inner  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise UsageError(f"{checkpoint.path} does not fit: {reason(error)}.") from None
    notes = list(checkpoint.notes)
    if prefix:
        notes.append(f"the prefix {prefix!r} of the names in {checkpoint.path} was taken off.")
    # A safetensors file never has torch's metadata; its header has been compared already.
    if methods is None or metadata is not None:
        notes += [str(one.message) for one in said if one.category is fw.CheckpointWarning]
    return notes


def prefix_of(expected: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return what stands before every name of the model's in the checkpoint."""
    first = next(iter(expected), None)
    if first is None or first in state:
        return ""
    ending = f".{first}"
    found = [name.removesuffix(first) for name in state if name.endswith(ending)]
    return max(found, key=lambda one: sum(f"{one}{name}" in state for name in expected), default="")


def _compare_methods(
    model: nn.Module, checkpoint: Checkpoint, methods: dict[str, Any] | None, recipe: str
) -> None:
    """Refuse a checkpoint that says that it was trained with other methods."""
    if methods is None:
        return
    here = fw.describe(model)
    records = {
        weight_label(name, module): options_record(state_of(module).method)
        for name, module in converted(model)
    }
    if checkpoint.folded and here:
        raise UsageError(
            f"{checkpoint.path} was folded ({_some(checkpoint.folded)}): its weights are effective"
            f" ones, which --recipe {recipe} would normalize again. Give the recipe's norm alone,"
            " or the checkpoint of the training run."
        )
    if not methods and checkpoint.path.suffix != ".safetensors":
        return  # a plain model's, or another library's: what loading warns of
    differing = {
        name: (_text(methods.get(name)), here.get(name))
        for name in dict.fromkeys([*methods, *here])
        if methods.get(name) not in (here.get(name), records.get(name))
    }
    if not differing:
        return
    name, (saved, found) = next(iter(differing.items()))
    if saved is None:
        text = f"{name} is plain in {checkpoint.path} and {found} here"
    elif found is None:
        text = f"{name} was trained as {saved} ({checkpoint.path} says so) and is plain here"
    else:
        text = f"{name} was trained as {saved} ({checkpoint.path} says so) and is {found} here"
    raise UsageError(
        f"{text}; so for {len(differing)} layers. Another method is another function: give with"
        f" --recipe what it was trained with (here: {recipe})."
    )


def _some(methods: Mapping[str, str]) -> str:
    names = list(dict.fromkeys(methods.values()))
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _text(saved: Any) -> str | None:
    """Return a method as its text, from a text or from a flat record."""
    if saved is None or isinstance(saved, str):
        return saved
    options = {name: one for name, one in saved.items() if name not in ("method", "format")}
    try:
        return str(METHODS[saved["method"]](**options))
    except (KeyError, TypeError, ValueError):  # another version's options, or a label
        return str(saved.get("method"))


def _compare_names(
    model: nn.Module,
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> None:
    added = {
        f"{name}.{own}".lstrip(".")
        for name, module in converted(model)
        for own in (*state_of(module).sources[1:], "input_mean", "num_batches_tracked", "bias")
    }
    missing = [name for name in expected if name not in state and name not in added]
    extra = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {_shape(state[name])} and not {_shape(one)}"
        for name, one in expected.items()
        if name in state and state[name].shape != one.shape
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} are missing (first: {', '.join(missing[:NAMED])})")
    if extra:
        parts.append(f"{len(extra)} are unknown to it (first: {', '.join(extra[:NAMED])})")
    if shapes:
        parts.append(f"{len(shapes)} have another shape ({'; '.join(shapes[:NAMED])})")
    if parts:
        raise UsageError(
            f"{checkpoint.path} does not fit the model of {len(expected)} tensors:"
            f" {', '.join(parts)}. --classes sets the size of the classifier; a model of your own"
            " is named as package.module:factory."
        )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
