"""What bounds a training step: where a contestant's time beyond the baseline goes.

Two views of the same steps. *Operations*: time inside each operation of torch, its callees left
out, as torch's profiler sees it. *Functions*: time inside each Python function, as cProfile sees
it. Both slow the step down, calls more than work, so that they show where time goes and not how
much it is: that is what step.py is for.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from filterwise.lab.errors import LabError, UsageError
from harness.command import Outcome, Table, options, run
from harness.contestants import CONTESTANTS, chosen, weight_layers
from harness.nets import NETS
from harness.steps import Cell, ready
from harness.timing import Rounds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from filterwise.lab.terminal import Terminal
    from harness.command import Options
    from harness.steps import Step

LINES = 20


def parser() -> Options:
    """Return the command's options."""
    found = options("Where a step's time beyond the plain network's goes.", Rounds(20, 20))
    add = found.add_argument
    add("--net", default="small", help=f"one of {', '.join(NETS)}")
    add("--batch", type=int, default=1, help="pictures in a micro-batch")
    add("--micro-batches", type=int, default=1, help="micro-batches in a step")
    add("--contestant", default="ws", help=f"one of {', '.join(CONTESTANTS)}")
    add("--baseline", default="gn", help="whose time is taken off")
    add("--size", type=int, help="height and width of the pictures; the network's own if not given")
    return found


def measure(asked: argparse.Namespace, rounds: Rounds, terminal: Terminal) -> Outcome:
    """Profile both and take their difference."""
    del terminal
    name = "toy" if asked.quick else asked.net
    if name not in NETS:
        raise UsageError(f"--net: there is no network {name!r}. Known: {', '.join(NETS)}.")
    device = torch.device(asked.device)
    cell = Cell(
        NETS[name],
        asked.batch,
        asked.micro_batches,
        asked.size,
        device,
        asked.autocast,
        asked.compile,
    )
    steps, left_out = ready(chosen([asked.contestant], asked.baseline), cell)
    if left_out:
        raise LabError(left_out[0])
    layers = len(weight_layers(cell.net.build()))
    mine, plain = steps[asked.contestant], steps[asked.baseline]
    outcome = Outcome()
    for what, view in (("operations", _operations), ("functions", _functions)):
        unit = 1e6 / (layers * rounds.most)
        ours, theirs = view(mine, rounds.most), view(plain, rounds.most)
        found = {one: ours.get(one, 0.0) - theirs.get(one, 0.0) for one in ours | theirs}
        ranked = sorted(found.items(), key=lambda item: -item[1])
        title = f"{asked.contestant} beyond {asked.baseline}, {what}: {cell.title}"
        table = Table(title, (what, "us a layer and step"))
        table.rows += [[one, f"{unit * seconds:.2f}"] for one, seconds in ranked[:LINES]]
        table.rows.append(["all", f"{unit * sum(found.values()):.2f}"])
        outcome.tables.append(table)
        outcome.rows += [
            {"view": what, "name": one, "microseconds_per_layer": unit * seconds}
            for one, seconds in ranked
        ]
    return outcome


def _operations(step: Step, times: int) -> dict[str, float]:
    """Return seconds inside each operation over all steps, on the device where there is one."""
    cuda = step.cell.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with _without_chatter(), profile(activities=kinds) as seen:
        for _ in range(times):
            step()
    return {
        event.key: 1e-6 * (event.self_device_time_total if cuda else event.self_cpu_time_total)
        for event in seen.key_averages()
    }


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep torch's profiler from writing to the terminal that it found no GPU."""
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _functions(step: Step, times: int) -> dict[str, float]:
    """Return seconds inside each Python function over all steps."""
    seen = cProfile.Profile()
    seen.enable()
    for _ in range(times):
        step()
    seen.disable()
    found: dict[str, float] = {}
    rows: dict[tuple[str, int, str], tuple[int, int, float, float, object]]
    rows = pstats.Stats(seen).stats  # type: ignore[attr-defined]  # not in the type stubs
    for (path, _, name), (_, _, seconds, _, _) in rows.items():
        where = "" if path == "~" else f"{Path(path).parent.name}/{Path(path).name}: "
        found[f"{where}{name}"] = found.get(f"{where}{name}", 0.0) + seconds
    return found


if __name__ == "__main__":
    sys.exit(run("bounds", parser(), measure))
