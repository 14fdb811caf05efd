"""From a model's name and a checkpoint to a verified file."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import filterwise as fw
from filterwise.errors import ExportError, FoldError
from filterwise.filters import weight_name
from filterwise.formats import FORMATS
from filterwise.lab.checkpoints import load, read
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.models import find_model, picture_shape

if TYPE_CHECKING:
    from filterwise.lab.terminal import Terminal

__all__ = ["PRECISIONS", "ExportSettings", "Exported", "export_model"]

PRECISIONS = ("float32", "float16", "bfloat16", "float64")
SIDE = 224
SEED = 2019


@dataclass(frozen=True)
class ExportSettings:
    """What ``filterwise export`` was asked for.

    Attributes:
        model: Name as `find_model` takes it.
        to: The file to write.
        recipe: What the model was trained with.
        checkpoint: Its file, or None for the weights that the model comes with.
        key: Entry of the checkpoint that holds the state.
        part: Dotted name of the submodule to export, in place of the whole model.
        classes: Size of the classifier, where it is not the architecture's own.
        size: Input without its batch, or a side in pixels, as text.
        batch: Samples in the example.
        dynamic_batch: Whether the file takes any batch.
        opset: ONNX operator set.
        precision: Of weights and inputs in the file.
        merge_bn: Whether BatchNorms go into the layer before them; None by the format.
    """

    model: str
    to: str
    recipe: fw.Recipe
    checkpoint: str | None = None
    key: str | None = None
    part: str | None = None
    classes: int | None = None
    size: str | None = None
    batch: int = 1
    dynamic_batch: bool = False
    opset: int | None = None
    precision: str | None = None
    merge_bn: bool | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before a model is built.

        Raises:
            UsageError: If an option will not do.
        """
        target = Path(self.to)
        if target.suffix[1:].lower() not in FORMATS:
            endings = ", ".join(f".{one}" for one in FORMATS)
            raise UsageError(f"--to {self.to}: it must end in one of {endings}.")
        if not target.parent.is_dir():
            raise UsageError(f"--to {self.to}: there is no folder {target.parent}.")
        if target.is_dir():
            raise UsageError(f"--to {self.to}: that is a folder.")
        if self.opset is not None and target.suffix.lower() != ".onnx":
            raise UsageError(f"--opset is for .onnx, not for {target.name}.")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UsageError(f"--precision {self.precision}: one of {', '.join(PRECISIONS)}.")
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch}: it must be at least 1.")
        if self.key is not None and self.checkpoint is None:
            raise UsageError("--key chooses in a checkpoint: give --checkpoint too.")


@dataclass(frozen=True)
class Exported:
    """A file, where its model came from, and what is to be said of it."""

    settings: ExportSettings
    origin: str
    report: fw.ExportReport
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: what ``--json`` prints."""
        found = self.report.to_dict()
        return {
            "model": self.settings.model,
            "part": self.settings.part,
            "origin": self.origin,
            "recipe": str(self.settings.recipe),
            "checkpoint": self.settings.checkpoint,
            **found,
            "notes": list(self.notes),
        }

    def show(self, terminal: Terminal) -> None:
        """Write the report as lines."""
        settings, report = self.settings, self.report
        of = f"{settings.part} of {settings.model}" if settings.part else settings.model
        weights = settings.checkpoint or "the weights it comes with"
        terminal.print(f"{of} ({self.origin}), recipe {settings.recipe}, {weights}")
        for line in str(report).splitlines():
            if not line.startswith("note: "):
                terminal.print(line)
        for note in self.notes:
            terminal.warn(note)


def export_model(settings: ExportSettings) -> Exported:
    """Build, convert, load, fold, write and verify.

    Raises:
        UsageError: If there is no such model, part or checkpoint, or the two do not fit.
        ConversionError: If the recipe does not go on the model.
        LabError: If the model cannot be built, folded, exported or verified.
    """
    notes = []
    checkpoint = None
    if settings.checkpoint is not None:
        checkpoint = read(settings.checkpoint, settings.key)
    # What somebody's factory prints is no part of what this command prints.
    with redirect_stdout(sys.stderr):
        model, origin = find_model(settings.model, classes=settings.classes)
    if str(settings.recipe) != "keep":
        fw.convert_(model, settings.recipe)
    else:
        notes += _adopt(model)
    if checkpoint is not None:
        notes += load(model, checkpoint, str(settings.recipe))
    elif ":" not in settings.model:
        notes.append("without --checkpoint the weights are random: this only tries the way.")
    part = _part(model, settings.part)
    example = _example(part, settings)
    dtype = None if settings.precision is None else getattr(torch, settings.precision)
    try:
        report = fw.export(
            part.eval(),
            settings.to,
            example,
            bn=settings.merge_bn,
            dtype=dtype,
            opset=settings.opset,
            dynamic_batch=settings.dynamic_batch,
        )
    except (FoldError, ExportError) as error:
        raise LabError(_readable(error, settings)) from None
    return Exported(settings, origin, report, (*notes, *report.notes))


def _adopt(model: nn.Module) -> list[str]:
    """Take over layers that normalize their own weight, so that they fold; return what to say."""
    try:
        adopted = fw.adopt_(model).converted
    except fw.ConversionError as error:
        return [f"{error} They are exported with weights that are computed at run time."]
    if not adopted:
        return []
    methods = ", ".join(sorted(set(fw.describe(model).values())))
    return [f"{len(adopted)} layers that normalize their own weight were adopted: {methods}."]


def _readable(error: Exception, settings: ExportSettings) -> str:
    words = " ".join(str(error).split()).rstrip(".") + "."
    if "does not run on example_input" not in words:
        return words
    return (
        f"{words} --size sets the input (here: {settings.size or 'not given'}), and --part exports"
        f" a submodule, such as the backbone of a detector (here: {settings.part or 'not given'})."
    )


def _part(model: nn.Module, name: str | None) -> nn.Module:
    if name is None:
        return model
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children())
        raise UsageError(f"--part {name}: the model has none. It consists of {children}.") from None


def _example(model: nn.Module, settings: ExportSettings) -> torch.Tensor:
    """Return a seeded normal input of the size that was asked for, or the architecture's own."""
    shape = _shape(model, settings)
    generator = torch.Generator().manual_seed(SEED)
    tensors = [one for one in model.parameters() if one.is_floating_point()]
    dtype = tensors[0].dtype if tensors else torch.float32
    return torch.randn((settings.batch, *shape), generator=generator).to(dtype)


def _shape(model: nn.Module, settings: ExportSettings) -> tuple[int, ...]:
    sizes: tuple[int, ...] = ()
    if settings.size is not None:
        words = re.split(r"[x,]", settings.size)
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise UsageError(
                f"--size {settings.size}: numbers such as 224, 3x224x224 or 3x16x112x112 (the batch"
                " is --batch)."
            )
        sizes = tuple(int(word) for word in words)
        if len(sizes) > 1:
            return sizes
    first: Any = next((one for one in model.modules() if weight_name(one)), None)
    if isinstance(first, nn.Linear) and not sizes:
        return (first.in_features,)
    if not isinstance(first, nn.Conv2d):
        kind = "no weight layer" if first is None else f"a {type(first).__name__}"
        raise UsageError(
            f"the model begins with {kind}: give the whole input with --size 3x16x112."
        )
    known = None if sizes or settings.part else picture_shape(settings.model)
    return known or (first.in_channels, *(sizes or (SIDE,)) * 2)
