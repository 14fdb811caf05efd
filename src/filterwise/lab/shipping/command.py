"""The command: which models, how large, and where the figures go."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import filterwise as fw
from filterwise.lab.hardware import hardware, versions
from filterwise.lab.results import write_whole
from filterwise.lab.shipping.architectures import ARCHITECTURES
from filterwise.lab.shipping.ship import LIMIT, Shipped, ship
from filterwise.report import text_table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

PROGRAM = "python -m filterwise.lab.shipping"
KINDS = ("onnx", "pt2")
HEADERS = (
    "model", "recipe", "parameters", "pixels", "layers", "adopted", "folded", *KINDS, "seconds"
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = _options()
    given = parser.parse_args(arguments)
    unknown = [name for name in given.models if name not in ARCHITECTURES]
    kinds = tuple(given.kinds.split(","))
    if unknown:
        parser.error(f"no such model: {unknown[0]}. There are: {', '.join(ARCHITECTURES)}")
    if not set(kinds) <= set(KINDS):
        parser.error(f"--kinds {given.kinds}: of {', '.join(KINDS)}")
    words = sys.argv[1:] if arguments is None else arguments
    command = f"{PROGRAM} {shlex.join(words)}".rstrip()
    done: list[Shipped] = []
    failed: dict[str, str] = {}
    for name in given.models or ARCHITECTURES:
        print(name, file=sys.stderr)
        try:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(given.files or temporary)
                folder.mkdir(parents=True, exist_ok=True)
                done.append(ship(ARCHITECTURES[name], folder, small=given.small, kinds=kinds))
        except (fw.ConversionError, fw.FoldError, fw.ExportError, ValueError) as error:
            failed[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
        if given.out is not None:
            _write(given.out, done, failed, command)
    print(text_table(HEADERS, _rows(done), right=HEADERS[2:]))
    wrong = [one.architecture for one in done if not one.passed]
    for name in wrong:
        print(f"{name}: a file is further from the model than rounding explains", file=sys.stderr)
    return int(bool(failed or wrong))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM, description="Adopt or convert, fold, export and verify models of timm and"
        " torchvision, with random weights.", epilog=f"Example: {PROGRAM} nf_resnet50 --small"
    )  # fmt: skip
    parser.add_argument("models", nargs="*", help="which; all by default")
    parser.add_argument("--small", action="store_true", help="small models of the same blocks")
    parser.add_argument("--kinds", default=",".join(KINDS), help="onnx, pt2 (default: both)")
    parser.add_argument("--files", type=Path, help="folder to leave the files in")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl and README.md")
    return parser


def _rows(done: Sequence[Shipped]) -> list[list[str]]:
    return [
        [
            one.architecture,
            one.recipe,
            f"{one.parameters / 1e6:.1f} M",
            str(one.size),
            str(one.layers),
            "" if one.adopted is None else f"{one.adopted:.1g}",
            f"{one.folded:.1g}",
            *(_file(one, kind) for kind in KINDS),
            f"{one.seconds:.0f}",
        ]
        for one in done
    ]


def _file(one: Shipped, kind: str) -> str:
    if kind not in one.files:
        return ""
    text = f"{one.files[kind]:.1g}"
    if kind in one.rounding:
        file, torch_itself = one.rounding[kind]
        text += f" ({file:.1g}; torch {torch_itself:.1g})"
    return text


def _write(out: Path, done: Sequence[Shipped], failed: dict[str, str], command: str) -> None:
    """Write what was found; models of earlier calls keep their lines."""
    out.mkdir(parents=True, exist_ok=True)
    about = {**hardware(torch.device("cpu")), **versions("timm", "onnx", "onnxruntime")}
    found = [{**asdict(one), "passed": one.passed} for one in done]
    found += [{"architecture": name, "error": error} for name, error in failed.items()]
    records = {one["architecture"]: {**one, "command": command, "ran": about} for one in found}
    path = out / "results.jsonl"
    earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for record in map(json.loads, earlier):
        records.setdefault(record["architecture"], record)
    ordered = [records[name] for name in ARCHITECTURES if name in records]
    write_whole(path, "".join(f"{json.dumps(one)}\n" for one in ordered).encode())
    write_whole(out / "README.md", _page(ordered).encode())


def _page(records: Sequence[dict[str, Any]]) -> str:
    names = {field.name for field in fields(Shipped)}
    done = [
        Shipped(**{k: v for k, v in one.items() if k in names})
        for one in records
        if "error" not in one
    ]
    rows = [list(HEADERS), ["---"] * len(HEADERS), *_rows(done)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    wrong = {one["architecture"]: one["error"] for one in records if "error" in one}
    errors = "".join(f"\n- Failed: {name}: {words}" for name, words in wrong.items())
    commands = dict.fromkeys(
        (one["command"], ", ".join(f"{k} {v}" for k, v in one["ran"].items())) for one in records
    )
    ran = "".join(f"\n- Command: `{command}`, on {about}." for command, about in commands)
    return f"""# From a model to a file

Largest difference of the outputs from the model's, relative to their largest entry, in float32:
after `adopt_` (beside the foreign model), after `fold`, and of the file, read by onnxruntime or
`torch.export.load` on an input that writing it did not see. Where a file is further away than
{LIMIT:g}, the figures in brackets are against the model in float64: the file's, and that of the
folded model in torch, which is rounding alone. Weights are random; gains, biases, norms and branch
scalars were moved off their start, branches to 0.3 of the trunk, and BatchNorm statistics come from
batches alone: deep networks of random weights else make a hundredfold of every rounding.

{table}
{errors}{ran}
"""
