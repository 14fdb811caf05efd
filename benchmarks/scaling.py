"""How the cost beyond plain convolutions grows: with layers, with weights, with micro-batches.

Each sweep changes one thing of a row of 3x3 convolutions with GroupNorm and ReLU, and divides what
a step takes beyond the plain network by what it should be proportional to.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.errors import UsageError
from harness.command import Table, bracketed, names, options, run
from harness.contestants import CONTESTANTS, chosen
from harness.nets import Net, SmallNet
from harness.steps import Cell, side_by_side
from harness.timing import Rounds, Spread, spread

if TYPE_CHECKING:
    import argparse

    from filterwise.lab.terminal import Terminal
    from harness.command import Options, Outcome

CONTESTED = "gn-again,ws,ws-bare,ws-eager,official,timm,composer,layer-norm"


@dataclass(frozen=True)
class Point:
    """One size of a sweep.

    Attributes:
        layers: Convolutions in a row.
        channels: Of each.
        micro_batches: In a step.
        size: Height and width of the pictures.
    """

    layers: int = 50
    channels: int = 16
    micro_batches: int = 1
    size: int = 8

    @property
    def weights(self) -> int:
        """Number of converted weights."""
        return 9 * self.channels**2 * self.layers


@dataclass(frozen=True)
class Sweep:
    """What is changed, and what the cost is divided by.

    Attributes:
        title: For the table.
        points: Sizes.
        label: Writes what is changed.
        per: By what a step's time beyond plain is divided.
        unit: Of the quotient.
        factor: From seconds to the unit.
    """

    title: str
    points: tuple[Point, ...]
    label: str
    per: str
    unit: str
    factor: float


SWEEPS = {
    "layers": Sweep(
        "Layers of 16 channels, one micro-batch: us a layer and step beyond plain",
        tuple(Point(layers=count) for count in (10, 25, 50, 100, 200)),
        "layers",
        "layers",
        "microseconds",
        1e6,
    ),
    "weights": Sweep(
        "Weights, in 10 layers at 4 px: ps a weight and step beyond plain",
        tuple(Point(layers=10, channels=one, size=4) for one in (32, 64, 128, 256, 512)),
        "weights",
        "weights",
        "picoseconds",
        1e12,
    ),
    "micro-batches": Sweep(
        "Micro-batches, 50 layers of 16 channels: us a layer and micro-batch beyond plain",
        tuple(Point(micro_batches=count) for count in (1, 2, 4, 8, 16, 32)),
        "micro_batches",
        "passes",
        "microseconds",
        1e6,
    ),
}


def parser() -> Options:
    """Return the command's options."""
    # With two threads a map of 8 x 8 costs more to share out than to compute.
    found = options(
        "How the cost grows with layers, weights and micro-batches.", Rounds(30, 5, 10.0), threads=1
    )
    add = found.add_argument
    add("--sweeps", type=names, default=",".join(SWEEPS), help=f"of {', '.join(SWEEPS)}")
    add("--contestants", type=names, default=CONTESTED, help=f"of {', '.join(CONTESTANTS)}")
    return found


def measure(
    asked: argparse.Namespace, rounds: Rounds, terminal: Terminal, outcome: Outcome
) -> None:
    """Run the sweeps that were asked for."""
    for name in asked.sweeps:
        if name not in SWEEPS:
            raise UsageError(f"--sweeps: there is no sweep {name!r}. Known: {', '.join(SWEEPS)}.")
    contestants = chosen(asked.contestants, "gn")
    for name in asked.sweeps:
        sweep = SWEEPS[name]
        table = Table(sweep.title, [sweep.label, *(one.name for one in contestants[1:])])
        points = (Point(layers=2, micro_batches=2),) if asked.quick else sweep.points
        with terminal.progress(sweep.title, len(points)) as advance:
            for point in points:
                row = _row(sweep, point, contestants, asked, rounds, outcome)
                row["sweep"] = name
                outcome.rows.append(row)
                found = [Spread(**row["cost"][one.name]) for one in contestants[1:]]
                cells = [bracketed(one, 1) for one in found]
                table.rows.append([f"{getattr(point, sweep.label):,}", *cells])
                advance(1.0)
        outcome.tables.append(table)


def _row(
    sweep: Sweep,
    point: Point,
    contestants: list[Any],
    asked: argparse.Namespace,
    rounds: Rounds,
    outcome: Outcome,
) -> dict[str, Any]:
    net = Net(
        "row",
        f"{point.layers} layers of {point.channels} channels",
        partial(SmallNet, point.layers, point.channels),
        channels=point.channels,
        size=point.size,
        classes=10,
    )
    device = torch.device(asked.device)
    cell = Cell(net, 1, point.micro_batches, None, device, asked.autocast, asked.compile)
    # Deeper rows blow a difference of eps up until outputs have nothing in common.
    times, left_out = side_by_side(contestants, cell, rounds, compare=point.layers <= 50)
    outcome.notes += left_out
    divisor = {
        "layers": point.layers,
        "weights": point.weights,
        "passes": point.layers * point.micro_batches,
    }[sweep.per]
    factor = sweep.factor / divisor
    return {
        **asdict(point),
        "weights": point.weights,
        "plain_milliseconds": 1e3 * spread(times["gn"]).median,
        "unit": f"{sweep.unit} by {sweep.per}",
        "cost": {
            name: asdict(spread([factor * (a - b) for a, b in zip(mine, times["gn"], strict=True)]))
            for name, mine in times.items()
        },
        "seconds": {name: [round(value, 7) for value in mine] for name, mine in times.items()},
    }


if __name__ == "__main__":
    sys.exit(run("scaling", parser(), measure))
