"""The command: trains what is missing in the folder, and writes the tables."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from filterwise.lab.data import load
from filterwise.lab.early_warnings.measure import Measured, Measurements, measure
from filterwise.lab.early_warnings.runs import Group, Run, runs
from filterwise.lab.early_warnings.tables import kinds_table, page
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.results import write_whole
from filterwise.report import text_table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

GROUPS: tuple[Group, ...] = ("choose", "judge")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m filterwise.lab.early_warnings",
        description="Which warnings come before a collapse, how far ahead, and which for nothing."
        " Interrupted, the same command carries on; two commands on one folder share the work.",
        epilog="Example: python -m filterwise.lab.early_warnings --group judge --limit 4",
    )
    add = parser.add_argument
    add("--group", choices=GROUPS, help="one of the two groups of runs; both without it")
    add("--limit", type=int, help="only the first so many runs of a group")
    add("--data", default="digits", help="digits, a torchvision name, or a class-folder tree")
    add("--root", default="data", help="folder in which torchvision's sets lie")
    add("--out", type=Path, default=Path("runs/early_warnings"), help="folder of the results")
    return parser


def _missing(wanted: Sequence[Run], results: Measurements) -> list[Run]:
    known = results.read().records
    return [run for run in wanted if run.identity not in known]


def _work(given: argparse.Namespace, command: str) -> dict[str, list[Measured]]:
    if given.limit is not None and given.limit < 1:
        raise UsageError("--limit must be 1 or more")
    data = load(given.data, root=given.root)
    torch.set_num_threads(1)
    results = Measurements(given.out)
    results.prepare()
    name = Path(data.name).name
    asked = (given.group,) if given.group else GROUPS
    wanted = {group: list(runs(group, name, data.sha256))[: given.limit] for group in asked}
    for run in _missing([one for group in wanted.values() for one in group], results):
        with results.claim(run.identity) as mine:
            if mine and _missing([run], results):
                done = measure(run, data)
                results.add(done)
                print(f"{done.end:<20} {run.title}, seed {run.seed}", file=sys.stderr)
    known = results.read().records
    groups = {
        group: [
            known[one.identity] for one in runs(group, name, data.sha256) if one.identity in known
        ]
        for group in GROUPS
    }
    origin = data.origin.replace(data.name, name)
    write_whole(given.out / "README.md", page(groups, command, origin).encode())
    return {group: groups[group] for group in asked}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = _options()
    given = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = f"python -m filterwise.lab.early_warnings {shlex.join(words)}".rstrip()
    try:
        groups = _work(given, command)
    except UsageError as error:
        parser.error(str(error))
    except (LabError, OSError) as error:
        print(f"early_warnings: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("early_warnings: stopped; finished runs are kept.", file=sys.stderr)
        return 130
    for group, found in groups.items():
        if found:
            print(f"\n{group}: {len(found)} runs\n\n{text_table(*kinds_table(found))}")
    return 0
