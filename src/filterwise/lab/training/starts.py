"""Weights to start from: another run's, or a checkpoint file's."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab import checkpoints
from filterwise.lab.errors import UsageError
from filterwise.lab.training.checkpoint import RunFolder
from filterwise.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from filterwise.lab.checkpoints import Checkpoint
    from filterwise.lab.training.settings import Execution, ModelSettings

__all__ = ["Source", "fill", "read"]


@dataclass(frozen=True)
class Source:
    """What a network starts from.

    Attributes:
        checkpoint: The tensors.
        recipe: What the network is converted by when it takes them, in canonical text.
        last: Whether that is its own recipe, so that they are taken after the conversion.
        facts: What the record says of it.
    """

    checkpoint: Checkpoint
    recipe: str
    last: bool
    facts: dict[str, Any]


def read(settings: ModelSettings, execution: Execution) -> Source:
    """Read the weights that a network starts from.

    Raises:
        UsageError: If they are not there, saying what makes them, or belong to another network.
        LabError: If they cannot be read.
    """
    path = Path(execution.runs).expanduser() / Path(str(settings.start)).expanduser()
    if path.is_dir():
        return _from_run(path, settings, execution)
    if not path.exists():
        raise UsageError(
            f"model.start: there is neither a run nor a checkpoint at {path}. {_remedy(execution)}"
        )
    checkpoint = checkpoints.read(str(path))
    facts = {"path": str(settings.start), "sha256": _digest(checkpoint.state)}
    gains = any(name.rpartition(".")[2] == "gain" for name in checkpoint.state)
    last = bool(checkpoint.methods) or gains
    return Source(checkpoint, settings.recipe if last else "keep", last, facts)


def _remedy(execution: Execution) -> str:
    if execution.start_command:
        return f"This makes it: {execution.start_command}"
    return "Train that run first, to its end."


def _from_run(path: Path, settings: ModelSettings, execution: Execution) -> Source:
    folder = RunFolder(path)
    record = folder.finished()
    if record is None:
        raise UsageError(
            f"model.start: {path} is not the folder of a finished run. {_remedy(execution)}"
        )
    if record.status != "finished":
        raise UsageError(
            f"model.start: the run in {path} {record.status}, and its weights are no start."
        )
    model = record.settings.model
    if (model.name, model.width) != (settings.name, settings.width):
        raise UsageError(
            f"model.start: the run in {path} trained {model.name} of width {model.width:g}, and"
            f" here it is {settings.name} of width {settings.width:g}."
        )
    checkpoint = checkpoints.read(str(folder.weights))
    facts = {
        "path": str(settings.start),
        "id": record.id,
        "sha256": _digest(checkpoint.state),
    }
    same = ("recipe", "select", "exclude", "norms")
    if all(getattr(model, name) == getattr(settings, name) for name in same):
        return Source(checkpoint, model.recipe, True, facts)
    if Recipe.parse(model.recipe).method is not None or model.norms != type(model.norms)():
        raise UsageError(
            f"model.start: the run in {path} was trained by recipe {model.recipe!r}; with a method,"
            f" or with norms of its own, it can start the same only, and not {settings.recipe!r}."
        )
    return Source(checkpoint, model.recipe, False, facts)


def _digest(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all tensors, by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        values = state[name].detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def fill(model: nn.Module, source: Source) -> None:
    """Load weights into a network; a classifier for another number of classes stays as drawn.

    Raises:
        UsageError: If they are of another network.
    """
    own, state = model.state_dict(), source.checkpoint.state
    prefix = checkpoints.prefix_of(own, state)
    other = {
        name: values
        for name, values in own.items()
        if prefix + name in state and state[prefix + name].shape != values.shape
    }
    last = [name for name in own if name.endswith("weight")][-1].rpartition(".")[0]
    checkpoint = source.checkpoint
    if other and {name.rpartition(".")[0] for name in other} == {last}:
        changed = OrderedDict(state)
        changed.update({prefix + name: values for name, values in other.items()})
        if hasattr(state, "_metadata"):
            changed._metadata = state._metadata  # type: ignore[attr-defined]
        checkpoint = replace(checkpoint, state=changed)
        source.facts["drawn_anew"] = last
    checkpoints.load(model, checkpoint, source.recipe)
