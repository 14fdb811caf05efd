"""The bars: what the normalization of weights may cost, measured, met or not.

Runs exactly what each bar needs. A bar is met if the median is at most the bar; quartiles and a
95 % interval of the median stand beside it, and what a second copy of the plain network gave.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.errors import UsageError
from harness import evaluations, forms
from harness.command import Outcome, Table, bracketed, names, options, run
from harness.contestants import CONTESTANTS, chosen, weight_layers
from harness.memory import converted_bytes, peak
from harness.nets import NETS
from harness.steps import Cell, side_by_side
from harness.timing import Rounds, Spread, ratios, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from filterwise.lab.terminal import Terminal
    from harness.command import Options

    Advance = Callable[[float], None]


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    Attributes:
        what: What was measured, and in what unit.
        asked: The bar; None where a figure stands for comparison only.
        own: What the project holds itself to, where that is another number.
        found: What was measured.
        noise: What a second copy of the plain network gave in the same rounds.
        digits: Decimals that count: a bar of 1.00 is met by what rounds to it.
    """

    what: str
    asked: float | None
    own: float | None
    found: Spread
    noise: Spread | None = None
    digits: int = 3

    def meets(self, bar: float | None) -> str:
        """Return whether a bar is met, in a word."""
        if bar is None:
            return "-"
        return "met" if round(self.found.median, self.digits) <= bar else "missed"


Times = dict[str, list[float]]
Group = tuple[list[Measured], dict[str, Any]]


def parser() -> Options:
    """Return the command's options."""
    found = options("The bars: measured, met or not.", Rounds(30, 15, 600.0))
    found.add_argument("--only", type=names, default=",".join(GROUPS), help="some of them")
    return found


def measure(asked: argparse.Namespace, rounds: Rounds, terminal: Terminal) -> Outcome:
    """Measure the groups of bars that were asked for."""
    for name in asked.only:
        if name not in GROUPS:
            raise UsageError(f"--only: there is no group {name!r}. Known: {', '.join(GROUPS)}.")
    headers = (
        "bar",
        "asked",
        "met?",
        "own",
        "met? ",
        "median [quartiles]",
        "95 % of the median",
        "plain again",
        "rounds",
    )
    outcome = Outcome(tables=[Table("Bars", headers)])
    for name in asked.only:
        with terminal.progress(name, rounds.most) as advance:
            lines, times = GROUPS[name](asked, rounds, advance)
        for line in lines:
            outcome.tables[0].rows.append(_words(line))
            words = {**asdict(line), "met": line.meets(line.asked), "own_met": line.meets(line.own)}
            outcome.rows.append({"group": name, **words})
        outcome.rows.append({"group": name, "seconds": times})
    return outcome


def _words(line: Measured) -> list[str]:
    found = line.found
    return [
        line.what,
        "-" if line.asked is None else f"{line.asked:g}",
        line.meets(line.asked),
        "-" if line.own is None else f"{line.own:g}",
        line.meets(line.own),
        bracketed(found, line.digits),
        f"{found.low:.{line.digits}f} to {found.high:.{line.digits}f}",
        "-" if line.noise is None else bracketed(line.noise, line.digits),
        str(found.rounds),
    ]


def _cell(asked: argparse.Namespace, net: str, batch: int, micro_batches: int) -> Cell:
    name = "toy" if asked.quick else net
    device = torch.device(asked.device)
    return Cell(NETS[name], batch, micro_batches, None, device, asked.autocast, asked.compile)


def _against(times: Times, name: str, baseline: str) -> Spread:
    return spread(ratios(times[name], times[baseline]))


def _step(micro_batches: int, bar: float, own: float | None) -> Callable[..., Group]:
    def group(asked: argparse.Namespace, rounds: Rounds, advance: Advance) -> Group:
        cell = _cell(asked, "resnet50", 1, micro_batches)
        others = ["ws-bare", "ws-eager"] if micro_batches == 1 else []
        contestants = chosen(["gn-again", "ws", *others], "gn")
        times, _ = side_by_side(contestants, cell, rounds, advance)
        noise = _against(times, "gn-again", "gn")
        lines = [
            Measured(
                f"step: {cell.title}, gn+ws by gn", bar, own, _against(times, "ws", "gn"), noise
            )
        ]
        for other in others:
            without_numba = 1.14 if other == "ws-eager" else None
            what = f"  {CONTESTANTS[other].about}"
            found = _against(times, other, "gn")
            lines.append(Measured(what, None, without_numba, found, noise))
        return lines, times

    return group


def _pws(asked: argparse.Namespace, rounds: Rounds, advance: Advance) -> Group:
    cell = _cell(asked, "resnet50", 2, 8)
    times, _ = side_by_side(chosen(["bn-again", "pws"], "bn"), cell, rounds, advance)
    found, noise = _against(times, "pws", "bn"), _against(times, "bn-again", "bn")
    return [Measured(f"step: {cell.title}, pws by bn", 0.87, None, found, noise)], times


def _kernel(asked: argparse.Namespace, rounds: Rounds, advance: Advance) -> Group:
    layers = forms.shapes(0.1 if asked.quick else None)
    device = torch.device(asked.device)
    rows = forms.measured(layers, ["copy-again", "kernel"], device, rounds, advance)
    found = {row["contestant"]: Spread(**row["copies_both"]) for row in rows}
    parts = {row["contestant"]: row["seconds_forward"] for row in rows}
    what = "kernel: all ResNet-50 weights forward and backward, in copies"
    return [Measured(what, 3.5, 2.6, found["kernel"], found["copy-again"])], parts


def _evaluation(asked: argparse.Namespace, rounds: Rounds, advance: Advance) -> Group:
    words = argparse.Namespace(**{**vars(asked), "size": None})
    net = NETS["toy" if asked.quick else "resnet50"]
    ways = ["plain", "plain-again", "kept", "folded"]
    rows = evaluations.measured(net, 1, ways, words, rounds, advance)
    found = {row["contestant"]: Spread(**row["ratio"]) for row in rows}
    noise = found["plain-again"]
    lines = [
        Measured("evaluation: kept weights by plain", 1.01, 1.015, found["kept"], noise),
        Measured("evaluation: folded by plain", 1.0, None, found["folded"], noise, digits=2),
    ]
    return lines, {row["contestant"]: row["seconds"] for row in rows}


def _memory(asked: argparse.Namespace, rounds: Rounds, advance: Advance) -> Group:
    del rounds
    lines, peaks = [], {}
    times = 1 if asked.quick else 3
    for micro_batches, bar in ((1, 1.0), (3, 2.0)):
        cell = _cell(asked, "resnet50", 1, micro_batches)
        name = "ws-bare" if micro_batches == 1 else "ws"
        found = [peak(CONTESTANTS[one], cell, asked.threads, times) for one in ("gn", name)]
        peaks[f"{name}, micro-batches {micro_batches}"] = found
        advance(15.0)
        copies = spread([(found[1] - found[0]) / converted_bytes(cell)])
        mode = "training" if micro_batches == 1 else "deferred, 3 micro-batches"
        what = f"memory: {mode}, beyond plain, in copies of the converted weights"
        lines.append(Measured(what, bar, 1.1, copies, digits=2))
    return lines, peaks


def _small(asked: argparse.Namespace, rounds: Rounds, advance: Advance) -> Group:
    threads, lines, everything = torch.get_num_threads(), [], {}
    # On two threads a map of 8 x 8 costs more to share out than to compute; what is asked for is
    # the time of Python.
    torch.set_num_threads(1)
    rounds = Rounds(4 * rounds.most, rounds.least, rounds.seconds)
    try:
        for micro_batches, bar in ((1, 15.0), (8, None)):
            cell = _cell(asked, "small", 1, micro_batches)
            contestants = chosen(["gn-again", "ws", "ws-bare"], "gn")
            times, _ = side_by_side(contestants, cell, rounds, lambda one: advance(one / 8))
            passes = len(weight_layers(cell.net.build())) * micro_batches
            beyond = {
                name: spread(
                    [1e6 * (a - b) / passes for a, b in zip(mine, times["gn"], strict=True)]
                )
                for name, mine in times.items()
            }
            noise = beyond["gn-again"]
            unit = "us a layer and step" if micro_batches == 1 else "us a layer and micro-batch"
            for name, limit in (("ws", bar), ("ws-bare", None)):
                what = f"small net: micro-batches {micro_batches}, {name} beyond gn, {unit}"
                lines.append(Measured(what, limit, None, beyond[name], noise, digits=1))
            everything |= {f"{name}, {micro_batches}": mine for name, mine in times.items()}
    finally:
        torch.set_num_threads(threads)
    return lines, everything


GROUPS: dict[str, Callable[..., Group]] = {
    "step1": _step(1, 1.12, 1.08),
    "step8": _step(8, 1.03, None),
    "step32": _step(32, 1.01, None),
    "pws": _pws,
    "kernel": _kernel,
    "evaluation": _evaluation,
    "memory": _memory,
    "small": _small,
}
"""Bars by what is run for them."""


if __name__ == "__main__":
    logging.getLogger("filterwise").setLevel(logging.WARNING)
    sys.exit(run("bars", parser(), measure))
