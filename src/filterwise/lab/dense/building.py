"""What all dense tasks do with a network: convert the parts that a recipe is for, and start it."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import filterwise as fw
from filterwise.lab import checkpoints, nets
from filterwise.lab.errors import UsageError
from filterwise.lab.training.checkpoint import RunFolder
from filterwise.lab.training.norms import change_norms

if TYPE_CHECKING:
    from collections.abc import Callable

    from filterwise.lab.training.settings import Execution, ModelSettings

__all__ = ["converted"]

SCHEMES = ("kaiming", "balanced", "skipinit", "branch")
"""Initializations that need no data."""


def converted(
    model: nn.Module,
    settings: ModelSettings,
    takes: Callable[[str], bool],
    execution: Execution | None = None,
    body: str = "",
) -> tuple[nn.Module, dict[str, Any]]:
    """Convert a network by its settings, give it its first weights, and change its norms.

    Args:
        model: With random weights.
        settings: Recipe, patterns, initialization, norms and start.
        takes: Whether a layer or norm of this name is one that the recipe is for.
        execution: Where the runs lie that it may start from.
        body: Name of the module that a start has the weights of: the backbone.

    Returns:
        The model, and what the record says of it.

    Raises:
        UsageError: If a setting has no meaning here, or the start is missing or does not fit.
        ConversionError: If the recipe does not fit.
    """

    def named(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def outside(name: str, module: nn.Module) -> bool:
        del module
        return not takes(name) or named(name, settings.exclude)

    def inside(name: str, module: nn.Module) -> bool:
        # Linear layers and transposed convolutions are for those who ask for them by name.
        if settings.select is not None:
            return named(name, settings.select) and not outside(name, module)
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return convolution and not outside(name, module)

    report = nets.convert(model, settings.recipe, select=inside, exclude=outside)
    facts: dict[str, Any] = {"conversion": report.summary}
    if settings.start is not None:
        facts["start"] = _start(model.get_submodule(body), settings.start, execution)
    elif settings.initialization in SCHEMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            fw.initialize_(model, settings.initialization)
    elif settings.initialization != "own":
        raise UsageError(
            f"model.initialization: {settings.initialization} is for classification; here there is"
            f" own, {', '.join(SCHEMES)}."
        )
    return change_norms(model, settings.norms), facts


def _start(body: nn.Module, start: str, execution: Execution | None) -> dict[str, Any]:
    """Load a backbone's weights from a classifier's run or checkpoint."""
    runs, command = (execution.runs, execution.start_command) if execution else (".", None)
    path = Path(runs).expanduser() / Path(start).expanduser()
    facts = {"path": start}
    if path.is_dir():
        folder = RunFolder(path)
        record = folder.finished()
        if record is not None and record.status == "finished":
            facts["id"] = record.id
        path = folder.weights
    if not path.is_file():
        remedy = f"This makes it: {command}" if command else "Train that run first, to its end."
        raise UsageError(f"model.start: there are no weights at {path}. {remedy}")
    state = checkpoints.read(str(path)).state
    own = body.state_dict()
    prefix = checkpoints.prefix_of(own, state)
    mine = {name.removeprefix(prefix): values for name, values in state.items()}
    # Torch counts batches in batch norms; frozen ones and other norms do not.
    missing = [name for name in own if name not in mine and not name.endswith("_tracked")]
    if missing:
        raise UsageError(
            f"model.start: the weights at {path} have no {missing[0]} and lack {len(missing)} of"
            f" {len(own)} values of the backbone: train it by the same recipe."
        )
    other = [name for name in own if name in mine and mine[name].shape != own[name].shape]
    if other:
        raise UsageError(
            f"model.start: at {path} {other[0]} is {tuple(mine[other[0]].shape)}, and the backbone"
            f" has {tuple(own[other[0]].shape)}."
        )
    body.load_state_dict({name: mine.get(name, values) for name, values in own.items()})
    return facts
