"""Evaluation, side by side: plain, folded, converted with and without kept weights, each peer.

Models are in evaluation mode, under ``torch.inference_mode``; ratios are within a round, to the
plain network.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from filterwise.lab.errors import UsageError
from harness.command import Outcome, Table, bracketed, names, numbers, options, run
from harness.evaluations import WAYS, measured
from harness.nets import NETS
from harness.timing import Spread

if TYPE_CHECKING:
    import argparse

    from filterwise.lab.terminal import Terminal
    from harness.command import Options
    from harness.timing import Rounds


def parser() -> Options:
    """Return the command's options."""
    found = options("Evaluation: plain, folded, converted, and each peer.")
    add = found.add_argument
    add("--nets", type=names, default="resnet50", help=f"of {', '.join(NETS)}")
    add("--batch", type=numbers, default="1", help="pictures")
    add("--contestants", type=names, default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    add("--size", type=int, help="height and width of the pictures; the network's own if not given")
    return found


def measure(asked: argparse.Namespace, rounds: Rounds, terminal: Terminal) -> Outcome:
    """Time every network and batch that was asked for."""
    for known, given, what in ((NETS, asked.nets, "network"), (WAYS, asked.contestants, "way")):
        for name in given:
            if name not in known:
                raise UsageError(f"there is no {what} {name!r}. Known: {', '.join(known)}.")
    outcome = Outcome()
    ways = list(dict.fromkeys(("plain", *asked.contestants)))
    for net in [NETS[name] for name in (["toy"] if asked.quick else asked.nets)]:
        for batch in asked.batch:
            title = f"{net.title}, {asked.size or net.size} px, batch {batch}, evaluation"
            with terminal.progress(title, rounds.most) as advance:
                rows = measured(net, batch, ways, asked, rounds, advance)
            outcome.rows += rows
            outcome.tables.append(_table(title, rows))
    return outcome


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title, ("contestant", "what it is", "ms", "to plain [quartiles]", "rounds"), left=2
    )
    for row in rows:
        ratio = Spread(**row["ratio"])
        words = WAYS[row["contestant"]][0]
        cells = [f"{row['milliseconds']:.2f}", bracketed(ratio), str(ratio.rounds)]
        table.rows.append([row["contestant"], words, *cells])
    return table


if __name__ == "__main__":
    logging.getLogger("filterwise").setLevel(logging.WARNING)
    sys.exit(run("inference", parser(), measure))
