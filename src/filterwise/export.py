"""Files to ship: a converted model folded, written, run from the file, and compared."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from filterwise import verify
from filterwise.convert import describe
from filterwise.errors import ExportError, FilterwiseWarning
from filterwise.filters import check_module
from filterwise.fold import fold_with_report
from filterwise.formats import FORMATS, Shipment, Written, file_metadata
from filterwise.norms import is_norm

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Comparison", "ExportReport", "export"]

LIMIT = 1e-5
"""Largest difference of a float32 file's output, relative to the largest entry."""

SEED = 2019


@dataclass(frozen=True)
class Comparison:
    """One input, run from the file and by the converted model.

    Attributes:
        shapes: Shapes of the arguments.
        difference: Largest difference of the outputs, relative to the largest entry.
        limit: What it was allowed to be.
        exact: The same against a float64 copy of the converted model; None where it was not needed.
        rounding: How far from that copy the plain model itself is, in the file's precision.
    """

    shapes: tuple[tuple[int, ...], ...]
    difference: float
    limit: float
    exact: float | None = None
    rounding: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the file computes the model, up to the rounding that the model has itself."""
        if self.difference <= self.limit:
            return True
        if self.exact is None or self.rounding is None or not math.isfinite(self.rounding):
            return False
        return self.exact <= max(self.limit, 2 * self.rounding)

    def __str__(self) -> str:
        """Return the figures in a sentence."""
        shapes = ", ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        text = (
            f"input {shapes}: largest relative difference {self.difference:.2g}"
            f" (limit {self.limit:g})"
        )
        if self.exact is None:
            return text
        text += f"; from a float64 copy of the model {self.exact:.2g}, where the folded model"
        text += f" in torch has {self.rounding:.2g}"
        return f"{text}: rounding" if self.passed else text


@dataclass(frozen=True)
class ExportReport:
    """What was written and what was verified.

    Attributes:
        path: The file.
        kind: Its ending: onnx, pt2 or safetensors.
        size: Bytes, with those of a file of weights beside it.
        dtype: Precision of the weights.
        opset: ONNX operator set, else None.
        dynamic_batch: Whether the file takes any batch.
        folded: How many converted layers were folded.
        merged: How many BatchNorms were merged into the layer before them.
        norms: How many activation norms stay.
        reader: Who ran the file.
        comparisons: One for each input it was run on.
        facts: What else was verified.
        notes: What asks for attention.
    """

    path: Path
    kind: str
    size: int
    dtype: str
    opset: int | None
    dynamic_batch: bool
    folded: int
    merged: int
    norms: int
    reader: str
    comparisons: tuple[Comparison, ...]
    facts: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        """Return the report as lines."""
        kind = self.kind if self.opset is None else f"{self.kind}, opset {self.opset}"
        batch = "any batch" if self.dynamic_batch else "the batch it was traced with"
        batch = "" if self.kind == "safetensors" else f", {batch}"
        lines = [
            f"{self.path}: {kind}, {self.dtype}, {self.size / 1e6:.1f} MB{batch}",
            f"folded: {self.folded} layers; BatchNorms merged: {self.merged}; norms that stay:"
            f" {self.norms}",
        ]
        against = f"verified with {self.reader} against the converted model"
        by_shape: dict[Any, list[Comparison]] = {}
        for one in self.comparisons:
            by_shape.setdefault(one.shapes, []).append(one)
        for group in by_shape.values():
            worst = max(group, key=lambda one: one.difference)
            lines.append(
                f"{against}, {len(group)} x {worst}" if group[1:] else f"{against}, {worst}"
            )
        lines += [f"verified: {fact}" for fact in self.facts]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor | tuple[Tensor, ...],
    *,
    bn: bool | None = None,
    dtype: torch.dtype | None = None,
    opset: int | None = None,
    dynamic_batch: bool = False,
) -> ExportReport:
    """Fold a model, write it to a file, and verify the file against the model.

    The file is written beside its place, run from there (onnxruntime, the reloaded program, or a
    model with the reloaded tensors) on the example and on a second seeded input, compared with the
    model as it was given, and only then renamed. The model is exported as it computes in
    evaluation, and is not changed.

    Args:
        model: A converted model; a plain one is exported as it is.
        path: ``.onnx`` (written by ``torch.onnx.export(dynamo=True)``), ``.pt2`` (a program of
            `torch.export`) or ``.safetensors`` (the plain model's state, with what was folded in
            the header). The first and last need the extra ``export``.
        example_input: A tensor, or a tuple of the tensors that the model takes.
        bn: Merge each BatchNorm into the layer before it. By default in programs; not in
            safetensors, whose keys are then those of the plain model.
        dtype: Precision of weights and floating inputs in the file; by default the model's.
        opset: ONNX operator set; by default the exporter's.
        dynamic_batch: Let the first axis of every input take any size.

    Returns:
        What was written, with the figures of what was verified.

    Raises:
        ExportError: If the model does not export, or the file computes something else: more than
            1e-5 (float32; `filterwise.fold`'s limits else) of the largest output, which is repeated
            against a float64 copy to tell rounding from error. No file is left then, and one that
            was there stays.
        FoldError: If the model does not fold.

    Example:
        >>> import tempfile
        >>> from filterwise.convert import convert_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> _ = convert_(model, "wa")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export(model, f"{folder}/net.pt2", torch.randn(1, 3, 8, 8))
        >>> report.folded, report.comparisons[0].difference <= 1e-5
        (1, True)
    """
    check_module(model)
    target, arguments = Path(path), _checked(example_input)
    kind = target.suffix[1:].lower()
    if kind not in FORMATS:
        endings = ", ".join(f".{one}" for one in FORMATS)
        raise ExportError(f"{target.name!r} does not end in one of {endings}")
    if opset is not None and kind != "onnx":
        raise ExportError(f"opset is for .onnx only, not for {target.name!r}")
    if not target.parent.is_dir():
        raise ExportError(f"there is no folder {target.parent} to write {target.name} into")
    if dynamic_batch:
        arguments = _batch_of(arguments, max(2, len(arguments[0])))
    methods = describe(model)
    with verify.evaluating(model), warnings.catch_warnings():
        _try(model, arguments)
        warnings.filterwarnings("ignore", "nothing to fold", FilterwiseWarning)
        plain, folded = fold_with_report(
            model, bn=kind != "safetensors" if bn is None else bn, example_input=arguments
        )
        plain = plain if dtype is None else plain.to(dtype)
        precision = _precision(plain)
        shipped = Shipment(
            plain, _cast(arguments, precision), dynamic_batch, opset, file_metadata(methods)
        )
        with _beside(target) as written_to:
            written = shipped.write(written_to)
            comparisons = tuple(
                _compare(model, plain, written, one, precision)
                for one in _inputs(arguments, dynamic_batch)
            )
            failed = [one for one in comparisons if not one.passed]
            if failed:
                why = _why(failed[0], plain, _cast(arguments, precision))
                raise ExportError(f"{target.name} was not kept: {why}")
            size = sum(one.stat().st_size for one in written_to.parent.iterdir())
    actions = [row.action for row in folded]
    return ExportReport(
        target,
        kind,
        size,
        str(precision)[6:],
        written.opset,
        dynamic_batch,
        len(methods),
        actions.count("merge"),
        sum(is_norm(module) for module in plain.modules()),
        written.reader,
        comparisons,
        tuple(written.facts),
        # How the graph was found asks for nothing.
        (*(one for one in folded.notes if not one.startswith("What follows")), *written.notes),
    )


def _checked(example_input: Any) -> tuple[Tensor, ...]:
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    if not arguments or not all(isinstance(one, Tensor) for one in arguments):
        kinds = ", ".join(type(one).__name__ for one in arguments) or "nothing"
        raise ExportError(f"example_input must be a tensor or a tuple of tensors, got {kinds}")
    return arguments


def _try(model: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    try:
        model(*arguments)
    except Exception as error:  # the model's own code
        shapes = ", ".join("x".join(map(str, one.shape)) for one in arguments)
        words = " ".join(str(error).split())[:300]
        raise ExportError(
            f"the model does not run on example_input ({shapes}): {type(error).__name__}: {words}"
        ) from error


def _precision(model: nn.Module) -> torch.dtype:
    tensors = [*model.parameters(), *model.buffers()]
    return next((one.dtype for one in tensors if one.is_floating_point()), torch.float32)


def _cast(arguments: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(one.to(dtype) if one.is_floating_point() else one for one in arguments)


def _batch_of(arguments: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Return arguments with `size` samples: a batch of one would be taken for a constant."""
    return tuple(one[torch.arange(size, device=one.device) % len(one)] for one in arguments)


def _inputs(arguments: tuple[Tensor, ...], dynamic: bool) -> Iterator[tuple[Tensor, ...]]:
    """Yield the example, and other values: of other sizes too, where the file takes them."""
    yield arguments
    other = _batch_of(arguments, len(arguments[0]) + 1) if dynamic else arguments
    generator = torch.Generator().manual_seed(SEED)
    yield tuple(
        torch.randn(one.shape, generator=generator).to(one) if one.is_floating_point() else one
        for one in other
    )
    if dynamic:
        yield _batch_of(arguments, 1)


def _compare(
    model: nn.Module,
    plain: nn.Module,
    written: Written,
    arguments: tuple[Tensor, ...],
    precision: torch.dtype,
) -> Comparison:
    """Run the file; where it differs by more than allowed, find out whether that is rounding."""
    shapes = tuple(tuple(one.shape) for one in arguments)
    cast = _cast(arguments, precision)
    found = verify.floating_tensors(written.run(cast))
    expected = verify.floating_tensors(model(*arguments))
    difference = verify.relative_difference(expected, found)
    limit = LIMIT if precision == torch.float32 else verify.tolerance(precision)
    if difference <= limit:
        return Comparison(shapes, difference, limit)
    try:
        wide = verify.widened(model)
        exact = verify.floating_tensors(wide(*_cast(arguments, torch.float64)))
    except Exception:  # a model whose own code insists on float32
        return Comparison(shapes, difference, limit)
    rounding = verify.relative_difference(exact, plain(*cast))
    return Comparison(shapes, difference, limit, verify.relative_difference(exact, found), rounding)


def _why(failed: Comparison, plain: nn.Module, arguments: tuple[Tensor, ...]) -> str:
    """Say what is wrong with a file: the precision it was asked for, or more than that."""
    if failed.rounding is None or math.isfinite(failed.rounding):
        return f"it computes something else than the model, {failed}, so it is not rounding"
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not all(bool(one.isfinite().all()) for one in verify.floating_tensors(output)):
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: look(name, output))
        for name, module in plain.named_modules()
    ]
    try:
        plain(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    where = f", first at {found[0]}" if found and found[0] else ""
    dtype = str(_precision(plain))[6:]
    return (
        f"the folded model overflows in {dtype}{where}, where the converted one stays finite;"
        " bfloat16 and float32 have the range, and ws(scale=fan_in) makes filters shorter"
    )


class _beside:
    """A path in a folder of its own beside the target; on success all that is in it is moved."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        try:
            self.folder = Path(
                tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent)
            )
        except OSError as error:
            raise ExportError(f"{self.target} cannot be written: {error.strerror}") from None
        return self.folder / self.target.name

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                # The file itself last: what lies beside it must be there before it.
                files = sorted(self.folder.iterdir(), key=lambda one: one.name == self.target.name)
                for file in files:
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
                    os.replace(file, self.target.parent / file.name)
        except OSError as error:
            raise ExportError(f"{self.target} cannot be written: {error.strerror}") from None
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
