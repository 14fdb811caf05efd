"""Three file formats for a plain model: how each is written, and run again from the file alone.

ONNX and safetensors need the extra ``export``, which is imported only when one of them is asked
for; a program of `torch.export` needs torch alone.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import warnings
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from filterwise.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["FORMATS", "Shipment", "Written", "file_metadata"]

FORMATS = ("onnx", "pt2", "safetensors")
"""File endings, without the dot."""

CONVOLVING = ("Conv", "ConvTranspose", "Gemm")
READS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "safetensors": ("safetensors",)}


@dataclass(frozen=True)
class Shipment:
    """A plain model on its way into a file.

    Attributes:
        model: The plain model, in evaluation mode.
        arguments: Tensors to trace it with.
        dynamic_batch: Whether the first axis of every argument is to take any size.
        opset: ONNX operator set, or None for the exporter's own.
        metadata: Texts to be written into the file.
    """

    model: nn.Module
    arguments: tuple[Tensor, ...]
    dynamic_batch: bool
    opset: int | None
    metadata: dict[str, str]

    def write(self, path: Path) -> Written:
        """Write the file that its ending asks for, read it back, and say how to run it.

        Raises:
            ExportError: If the extra is missing, or the exporter or the reader gives up.
        """
        kind = path.suffix[1:].lower()
        _require(kind)
        writers: dict[str, Callable[[Shipment, Path], Written]] = {
            "onnx": _onnx,
            "pt2": _program,
            "safetensors": _tensors,
        }
        with _quiet():
            return writers[kind](self, path)

    @property
    def shapes(self) -> Any:
        """What `torch.export` is told of the arguments' shapes."""
        if not self.dynamic_batch:
            return None
        batch = torch.export.Dim("batch")
        return tuple({0: batch} for _ in self.arguments)


@dataclass(frozen=True)
class Written:
    """A file that was written and read back.

    Attributes:
        run: Calls what the file holds, and gives back its output.
        reader: Who runs it, with the version.
        opset: ONNX operator set of the file, else None.
        facts: Sentences on what was found in it.
        notes: Sentences that ask for attention.
    """

    run: Callable[[tuple[Tensor, ...]], Any]
    reader: str
    opset: int | None = None
    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _require(kind: str) -> None:
    for name in READS.get(kind, ()):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f".{kind} needs {name}, which cannot be imported ({_reason(error)}); install the"
                " extra with pip install 'filterwise[export]'"
            ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters from talking of their own insides; what matters is measured afterwards."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    loggers = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    try:
        for logger, _ in loggers:
            logger.setLevel(logging.ERROR)
        # A failing export prints the whole graph.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)


@contextmanager
def _told(what: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # exporters and runtimes raise anything
        more = f". {advice}" if advice else ""
        raise ExportError(f"{what}: {type(error).__name__}: {_reason(error)}{more}") from error


def _reason(error: BaseException) -> str:
    """Return what an error says in a line; exporters write pages, the cause last."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    words = " ".join(str(root).split("\n\n")[0].split())
    return words if len(words) <= 300 else f"{words[:300]} ..."


def _advice(shipment: Shipment) -> str:
    return "Without dynamic_batch it may go" if shipment.dynamic_batch else ""


def _program(shipment: Shipment, path: Path) -> Written:
    with _told("torch.export cannot export the folded model", _advice(shipment)):
        program = torch.export.export(
            shipment.model, shipment.arguments, dynamic_shapes=shipment.shapes
        )
        torch.export.save(program, path, extra_files=dict(shipment.metadata))
    with _told("the program cannot be loaded again"):
        module = torch.export.load(path).module()
    return Written(lambda arguments: module(*arguments), f"torch.export {torch.__version__}")


def _tensors(shipment: Shipment, path: Path) -> Written:
    from safetensors import __version__
    from safetensors.torch import load_file, save_file

    state = shipment.model.state_dict()
    # Tied tensors are written out once each, so that any loader finds every key.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    path.touch()
    mode = path.stat().st_mode
    with _told("the tensors cannot be written"):
        save_file(whole, path, metadata={"format": "pt", **shipment.metadata})
    path.chmod(mode)  # it makes its files for the owner alone
    again = copy.deepcopy(shipment.model)
    with _told("the tensors cannot be loaded again"), torch.no_grad():
        for tensor in again.state_dict().values():
            # So that a tensor that the file lacks cannot go unseen.
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        again.load_state_dict(load_file(path), strict=True)
    facts = [f"all {len(whole)} tensors of the folded model's state are in it"]
    return Written(lambda arguments: again(*arguments), f"safetensors {__version__}", facts=facts)


def _onnx(shipment: Shipment, path: Path) -> Written:
    count = len(shipment.arguments)
    names = ["input"] if count == 1 else [f"input_{i}" for i in range(count)]
    with _told("torch.onnx cannot export the folded model", _advice(shipment)):
        program = torch.onnx.export(
            shipment.model,
            shipment.arguments,
            dynamo=True,
            dynamic_shapes=shipment.shapes,
            input_names=names,
            opset_version=shipment.opset,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(shipment.metadata)
        program.save(path)
    opset, facts, notes = _read_graph(path)
    if shipment.opset is not None and opset != shipment.opset:
        raise ExportError(
            f"opset {shipment.opset} was asked for and the exporter wrote {opset}; take that one"
        )
    run, reader = _session(path, names)
    return Written(run, reader, opset, facts, notes)


def _read_graph(path: Path) -> tuple[int, list[str], list[str]]:
    """Return the operator set, and whether runtimes get their weights as constants."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    constants = {one.name for one in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in CONVOLVING]
    computed = [node.name for node in layers if node.input[1] not in constants]
    if not computed:
        return (
            opset,
            [f"the weights of all {len(layers)} convolutions and linear layers are constants"],
            [],
        )
    note = (
        f"{len(computed)} of {len(layers)} convolutions and linear layers compute their weight at"
        f" run time (first: {computed[0]}), which TensorRT and quantizers may refuse: layers of"
        " another library that standardize their own weight are not folded."
    )
    return opset, [], [note]


def _session(path: Path, names: list[str]) -> tuple[Callable[[tuple[Tensor, ...]], Any], str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    with _told("onnxruntime cannot run the file, so it could not be verified"):
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    taken = {one.name for one in session.get_inputs()}

    def run(arguments: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {
            name: value.detach().cpu().numpy()
            for name, value in zip(names, arguments, strict=True)
            if name in taken
        }
        with _told("onnxruntime cannot run the file, so it could not be verified"):
            return [torch.from_numpy(one) for one in session.run(None, feed)]

    return run, f"onnxruntime {onnxruntime.__version__}"


def file_metadata(methods: dict[str, str]) -> dict[str, str]:
    """Return what a file says of itself: that nothing in it is converted, and what was folded.

    ``filterwise`` is what `filterwise.describe` gives of the model in the file, so that a loader
    which compares it sees that the weights are effective ones.
    """
    return {
        "filterwise": json.dumps({}),
        "filterwise_folded": json.dumps(methods),
    }
