"""One model, all the way, with a figure at each stage."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import filterwise as fw
from filterwise.verify import floating_tensors, relative_difference

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from filterwise.lab.shipping.architectures import Architecture

__all__ = ["LIMIT", "Shipped", "ship"]

LIMIT = 1e-5
SETTLING = 2  # batches in training mode, for running statistics
SAMPLES = 2
BRANCH = 0.3


@dataclass(frozen=True)
class Shipped:
    """How far each stage is from the model, relative to the largest entry of its output.

    Attributes:
        architecture: Its name.
        recipe: What it was converted by, or "adopt".
        parameters: How many it has.
        size: Side of the pictures.
        layers: How many layers are filterwise's.
        adopted: The adopted model beside the foreign one; None where it was converted.
        folded: The folded model.
        files: For each kind of file its difference, on an input that writing it did not see.
        rounding: The same against a float64 copy of the model, and what the folded model in torch
            has there, where a file is further away than `LIMIT`; else None.
        seconds: All of it.
    """

    architecture: str
    recipe: str
    parameters: int
    size: int
    layers: int
    adopted: float | None
    folded: float
    files: dict[str, float]
    rounding: dict[str, tuple[float, float]]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every file computes the model, up to twice the rounding that torch has itself."""
        return all(
            value <= LIMIT or self.rounding[kind][0] <= 2 * self.rounding[kind][1]
            for kind, value in self.files.items()
        )


def ship(
    one: Architecture, folder: Path, *, small: bool = False, kinds: tuple[str, ...] = ("onnx",)
) -> Shipped:
    """Make a model, bring it to a file of each kind, and compare at every stage.

    The model is moved off its start first: a branch that begins at zero would hide what is in it.

    Args:
        one: What to ship.
        folder: Where files go.
        small: Take the small model of the same blocks.
        kinds: Endings of the files: onnx, pt2.

    Raises:
        ConversionError, FoldError, ExportError: As the calls do.
        ValueError: If adopted keys differ, or a layer was left foreign.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    model = (one.small if small else one.whole)()
    side = one.small_size if small else one.size
    generator = torch.Generator().manual_seed(1)
    x, settling, other = (
        torch.randn(SAMPLES, 3, side, side, generator=generator) for _ in range(3)
    )
    _move(model)
    adopted = None
    if one.recipe == "adopt":
        keys, model = list(model.state_dict()), model.eval()
        before = _run(model, x)
        fw.adopt_(model)
        adopted = relative_difference(before, _run(model, x))
        if list(model.state_dict()) != keys:
            raise ValueError(f"{one.name}: adopt_ changed the keys of its checkpoint")
    else:
        with warnings.catch_warnings(action="ignore", category=fw.FilterwiseWarning):
            fw.convert_(model, one.recipe, exclude=list(one.exclude) or None)
    if not fw.describe(model):
        raise ValueError(f"{one.name}: no layer is filterwise's")
    _settle(model, settling + 0.2)
    folded = fw.fold_report(model, example_input=x)
    files, rounding = {}, {}
    for kind in kinds:
        path = folder / f"{one.name.replace(' ', '_')}.{kind}"
        fw.export(model, path, x)
        found, expected = _read(path, other), _run(model, other)
        files[kind] = relative_difference(expected, found)
        if files[kind] > LIMIT:
            rounding[kind] = _rounding(model, found, other)
    return Shipped(
        one.name,
        one.recipe,
        sum(parameter.numel() for parameter in model.parameters()),
        side,
        len(fw.describe(model)),
        adopted,
        folded.end_to_end or 0.0,
        files,
        rounding,
        time.perf_counter() - start,
    )


def _move(model: nn.Module) -> None:
    """Move gains, biases, norm parameters and branch scalars off their start.

    Branches get a share of the trunk, as training leaves them: at full size a deep network of
    random weights makes a hundredfold of every rounding.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1:
                parameter.fill_(BRANCH)
            elif parameter.numel() == max(parameter.shape):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                last: nn.Module = getattr(module, "bn3", module.bn2)
                last.get_parameter("weight").mul_(BRANCH)


def _settle(model: nn.Module, x: Tensor) -> None:
    """Take running statistics from batches alone: mixed with their start, they fit no layer."""
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for _ in range(SETTLING):
            model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _run(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


def _read(path: Path, x: Tensor) -> list[Tensor]:
    """Run a file as somebody does who has no filterwise."""
    if path.suffix == ".pt2":
        return floating_tensors(torch.export.load(path).module()(x))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return [torch.from_numpy(value) for value in session.run(None, {given.name: x.numpy()})]


def _rounding(model: nn.Module, found: list[Tensor], x: Tensor) -> tuple[float, float]:
    """Return how far the file and the folded model are from the model in float64."""
    plain = fw.fold(model)
    near = floating_tensors(_run(plain, x))
    exact = [value.float() for value in floating_tensors(_run(model.double(), x.double()))]
    model.float()
    return relative_difference(exact, found), relative_difference(exact, near)
