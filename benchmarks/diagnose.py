"""The recorder, side by side: a training step that is watched, by one that is not.

Every contestant is the same network with an optimizer of its own; one has no recorder. A recorded
step is timed, and a step that the recorder leaves out; what recording every 100th step costs is
computed from both.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

import filterwise as fw
from filterwise.lab.errors import UsageError
from harness.command import Table, bracketed, names, numbers, options, run
from harness.contestants import CONTESTANTS
from harness.nets import NETS
from harness.steps import Cell, Step
from harness.timing import Spread, clocked, interleaved, ratios, spread, warmed_up

if TYPE_CHECKING:
    import argparse

    from filterwise.lab.terminal import Terminal
    from harness.command import Options, Outcome
    from harness.timing import Rounds

PLAIN = "not recorded"
WATCHED: dict[str, tuple[list[str] | str | None, int]] = {
    "not recorded again": (None, 0),
    "left out": (None, 1_000_000_000),
    "weights": ("weights", 1),
    "gradients": ("gradients", 1),
    "activations": ("activations", 1),
    "all three": (None, 1),
    "channel histograms": ("channel_histogram", 1),
    "weight histograms": (["weight_histogram", "effective_weight_histogram"], 1),
    "duplicate filters": ("duplicate_filters", 1),
}
"""Signals and every how many steps; 0 is without a recorder."""


def parser() -> Options:
    """Return the command's options."""
    found = options("The recorder: what a watched step costs.")
    add = found.add_argument
    add("--nets", type=names, default="resnet50,small", help=f"of {', '.join(NETS)}")
    add("--contestant", default="ws", help=f"what is watched: of {', '.join(CONTESTANTS)}")
    add("--batch", type=numbers, default="2", help="pictures in a micro-batch")
    add("--micro-batches", type=numbers, default="1", help="micro-batches in a step")
    add("--size", type=int, help="height and width of the pictures; the network's own if not given")
    return found


def measure(
    asked: argparse.Namespace, rounds: Rounds, terminal: Terminal, outcome: Outcome
) -> None:
    """Time every network that was asked for."""
    if asked.compile:
        raise UsageError("--compile: a compiled model cannot be watched.")
    if asked.contestant not in CONTESTANTS:
        raise UsageError(f"--contestant: there is no {asked.contestant!r}.")
    for name in asked.nets:
        if name not in NETS:
            raise UsageError(f"--nets: there is no network {name!r}. Known: {', '.join(NETS)}.")
    device = torch.device(asked.device)
    for net in ["toy"] if asked.quick else asked.nets:
        for batch in asked.batch:
            for count in asked.micro_batches:
                cell = Cell(NETS[net], batch, count, asked.size, device, asked.autocast)
                title = f"{cell.title}, {asked.contestant}, watched"
                with terminal.progress(title, rounds.most) as advance:
                    rows = _rows(cell, asked, rounds, advance)
                outcome.rows += rows
                outcome.tables.append(_table(title, rows))


def _rows(
    cell: Cell, asked: argparse.Namespace, rounds: Rounds, advance: Any
) -> list[dict[str, Any]]:
    contestant = CONTESTANTS[asked.contestant]
    with ExitStack() as stack:
        steps = {PLAIN: Step(contestant, cell)}
        for name, (signals, every) in WATCHED.items():
            steps[name] = Step(contestant, cell)
            if every:
                recorder = fw.diagnose.record(steps[name].model, signals=signals, every=every)
                stack.enter_context(recorder)
        turns = {name: clocked(step, cell.device) for name, step in steps.items()}
        # The recorder records its first step, which is not what "left out" is about.
        warmed_up(turns)
        times = interleaved(turns, rounds, advance)
    rows = []
    for name, mine in times.items():
        ratio = spread(ratios(mine, times[PLAIN]))
        rows.append(
            {
                "net": cell.net.name,
                "size": cell.size or cell.net.size,
                "batch": cell.batch,
                "micro_batches": cell.micro_batches,
                "contestant": asked.contestant,
                "watched": name,
                "milliseconds": 1e3 * spread(mine).median,
                "ratio": asdict(ratio),
                "seconds": [round(value, 7) for value in mine],
            }
        )
    return rows


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    headers = ("recorded", "ms a step", "every step [quartiles]", "every 100 (computed)", "rounds")
    table = Table(title, headers)
    rest = next(row["ratio"]["median"] for row in rows if row["watched"] == "left out")
    for row in rows:
        ratio = Spread(**row["ratio"])
        watched = WATCHED.get(row["watched"], (None, 0))[1] == 1
        every = f"{(ratio.median + 99 * rest) / 100:.4f}" if watched else "-"
        cells = [f"{row['milliseconds']:.1f}", bracketed(ratio), every, str(ratio.rounds)]
        table.rows.append([row["watched"], *cells])
    return table


if __name__ == "__main__":
    sys.exit(run("diagnose", parser(), measure))
