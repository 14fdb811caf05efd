"""Training steps, side by side: time against the plain network, and peak memory.

Every contestant starts from the same first weights and takes one optimizer step (SGD, momentum) a
round; the order turns from round to round. Ratios are within a round, to the baseline.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.errors import UsageError
from harness.command import Outcome, Table, bracketed, names, numbers, options, run
from harness.contestants import CONTESTANTS, chosen, weight_layers
from harness.memory import converted_bytes, peak
from harness.nets import NETS
from harness.steps import Cell, side_by_side
from harness.timing import Spread, ratios, spread

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from filterwise.lab.terminal import Terminal
    from harness.command import Options
    from harness.timing import Rounds

CONTESTED = "gn-again,none,bn,ws,ws-bare,ws-eager,official,timm,composer,layer-norm,pws"


def parser() -> Options:
    """Return the command's options."""
    found = options("Training steps, side by side: time and peak memory.")
    add = found.add_argument
    add("--nets", type=names, default="resnet50", help=f"of {', '.join(NETS)}")
    add("--batch", type=numbers, default="1", help="pictures in a micro-batch")
    add("--micro-batches", type=numbers, default="1", help="micro-batches in a step")
    add("--contestants", type=names, default=CONTESTED, help=f"of {', '.join(CONTESTANTS)}")
    add("--baseline", default="gn", help="to whom ratios are taken")
    add("--size", type=int, help="height and width of the pictures; the network's own if not given")
    add("--memory", action="store_true", help="measure peak memory too, in fresh processes")
    return found


def measure(asked: argparse.Namespace, rounds: Rounds, terminal: Terminal) -> Outcome:
    """Time every network, batch and number of micro-batches that was asked for."""
    outcome = Outcome()
    contestants = chosen(asked.contestants, asked.baseline)
    for cell in _cells(asked):
        with terminal.progress(cell.title, rounds.most) as advance:
            times, left_out = side_by_side(contestants, cell, rounds, advance)
        outcome.notes += left_out
        if asked.baseline not in times:
            continue
        rows = rows_of(cell, times, asked.baseline)
        if asked.memory:
            _add_memory(rows, cell, asked)
        outcome.rows += rows
        outcome.tables.append(_table(cell, rows, asked))
    return outcome


def _cells(asked: argparse.Namespace) -> list[Cell]:
    for name in asked.nets:
        if name not in NETS:
            raise UsageError(f"--nets: there is no network {name!r}. Known: {', '.join(NETS)}.")
    device = torch.device(asked.device)
    return [
        Cell(NETS[net], batch, count, asked.size, device, asked.autocast, asked.compile)
        for net in (["toy"] if asked.quick else asked.nets)
        for batch in asked.batch
        for count in asked.micro_batches
    ]


def rows_of(cell: Cell, times: dict[str, list[float]], baseline: str) -> list[dict[str, Any]]:
    """Return a row for each contestant, the time of every round included."""
    layers = len(weight_layers(cell.net.build()))
    rows = []
    for name, mine in times.items():
        plain = times[baseline]
        beyond = [1e6 * (one - other) / layers for one, other in zip(mine, plain, strict=True)]
        row = {
            "net": cell.net.name,
            "size": cell.size or cell.net.size,
            "batch": cell.batch,
            "micro_batches": cell.micro_batches,
            "contestant": name,
            "baseline": baseline,
            "layers": layers,
            "milliseconds": 1e3 * spread(mine).median,
            "ratio": asdict(spread(ratios(mine, plain))),
            "microseconds_per_layer": asdict(spread(beyond)),
            "seconds": [round(value, 7) for value in mine],
        }
        rows.append(row)
    return rows


def _add_memory(rows: list[dict[str, Any]], cell: Cell, asked: argparse.Namespace) -> None:
    copy = converted_bytes(cell)
    for row in rows:
        row["peak_bytes"] = peak(
            CONTESTANTS[row["contestant"]], cell, asked.threads, 1 if asked.quick else 3
        )
        row["copies"] = (row["peak_bytes"] - rows[0]["peak_bytes"]) / copy


def _table(cell: Cell, rows: Sequence[dict[str, Any]], asked: argparse.Namespace) -> Table:
    headers = [
        "contestant",
        "what it is",
        "ms a step",
        f"to {asked.baseline} [quartiles]",
        "us a layer and step",
        "us a layer and micro-batch",
        "rounds",
    ]
    table = Table(cell.title, headers + ["peak MB", "copies more"] * asked.memory, left=2)
    for row in rows:
        ratio = Spread(**row["ratio"])
        beyond = row["microseconds_per_layer"]["median"]
        cells = [
            row["contestant"],
            CONTESTANTS[row["contestant"]].about,
            f"{row['milliseconds']:.1f}",
            bracketed(ratio),
            f"{beyond:.1f}",
            f"{beyond / cell.micro_batches:.1f}",
            str(ratio.rounds),
        ]
        if asked.memory:
            cells += [f"{row['peak_bytes'] / 1e6:.0f}", f"{row['copies']:.2f}"]
        table.rows.append(cells)
    return table


if __name__ == "__main__":
    sys.exit(run("step", parser(), measure))
