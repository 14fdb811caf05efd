"""Standardizing all weights of a model, forward and backward, in copies of the same weights.

One copy is ``kept.copy_(weight)`` over all layers into tensors that are kept: a new tensor that is
freed at once would be the same hot memory again, and the unit would shrink.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.errors import UsageError
from harness.command import Outcome, Table, bracketed, names, options, run
from harness.forms import measured, shapes
from harness.timing import Rounds, Spread

if TYPE_CHECKING:
    import argparse

    from filterwise.lab.terminal import Terminal
    from harness.command import Options

CONTESTED = "copy-again,kernel,kernel-eager,by-layer,official,timm,composer,layer-norm"
ABOUT = {
    "copy": "one copy into kept tensors",
    "copy-again": "the same once more: its distance is noise",
    "kernel": "filterwise, all layers in one call",
    "kernel-eager": "the same in plain torch operations",
    "by-layer": "filterwise, a node of autograd per layer",
    "official": "the official code",
    "timm": "timm's StdConv2d",
    "composer": "Composer",
    "layer-norm": "layer_norm on the weight",
}
BYTES = 28
"""Memory of the hungriest form per weight: weight, gradient, kept; two saved, result, gradient."""


def parser() -> Options:
    """Return the command's options."""
    found = options(
        "Standardizing all weights of a model, in copies of them.", Rounds(seconds=30.0)
    )
    add = found.add_argument
    add("--millions", type=names, default="1,3,10,resnet50,100,300", help="of weights")
    add("--contestants", type=names, default=CONTESTED, help=f"of {', '.join(ABOUT)}")
    return found


def measure(asked: argparse.Namespace, rounds: Rounds, terminal: Terminal) -> Outcome:
    """Time every size that was asked for."""
    for name in asked.contestants:
        if name not in ABOUT:
            raise UsageError(f"there is no contestant {name!r}. Known: {', '.join(ABOUT)}.")
    if asked.autocast or asked.compile:
        raise UsageError("--autocast and --compile are for whole networks: step.py, inference.py.")
    outcome = Outcome()
    for words in ["0.1"] if asked.quick else asked.millions:
        layers = shapes(_millions(words))
        weights = sum(torch.Size(shape).numel() for shape in layers)
        title = f"{weights / 1e6:.1f} M weights, {len(layers)} layers"
        free = _free(torch.device(asked.device))
        if free is not None and free < BYTES * weights:
            outcome.notes.append(
                f"{title} is left out: it takes {BYTES * weights / 1e9:.1f} GB,"
                f" {free / 1e9:.1f} GB are free."
            )
            continue
        with terminal.progress(title, rounds.most) as advance:
            rows = measured(layers, asked.contestants, torch.device(asked.device), rounds, advance)
        outcome.rows += rows
        outcome.tables.append(_table(title, rows))
    return outcome


def _millions(words: str) -> float | None:
    if words == "resnet50":
        return None
    try:
        millions = float(words)
    except ValueError:
        millions = 0.0
    if not 0 < millions <= 10_000:
        raise UsageError(f"--millions: {words!r} is neither a number above 0 nor resnet50.")
    return millions


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    headers = (
        "contestant",
        "what it is",
        "ps a weight: forward",
        "backward",
        "in copies: forward",
        "backward ",
        "both",
        "rounds",
    )
    table = Table(title, headers, left=2)
    for row in rows:
        parts = [Spread(**row[f"copies_{part}"]) for part in ("forward", "backward", "both")]
        table.rows.append(
            [
                row["contestant"],
                ABOUT[row["contestant"]],
                f"{row['picoseconds_per_weight_forward']:.0f}",
                f"{row['picoseconds_per_weight_backward']:.0f}",
                *(bracketed(part, 2) for part in parts),
                str(parts[0].rounds),
            ]
        )
    return table


if __name__ == "__main__":
    sys.exit(run("kernel", parser(), measure))
