"""The command: what to examine, how long, and where the page goes."""

from __future__ import annotations

import shlex
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from filterwise.lab.compatibility.architectures import (
    Architecture,
    all_architectures,
    representatives,
    sample,
)
from filterwise.lab.compatibility.examine import RECIPES
from filterwise.lab.compatibility.page import Scope, page
from filterwise.lab.compatibility.records import Records, source_digest
from filterwise.lab.compatibility.workers import Job, count_all, examine_all
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.results import write_whole
from filterwise.lab.settings import cores
from filterwise.lab.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["main"]

LARGEST = 100_000_000
OUTCOMES = ("passed", "refused", "diverges", "failed", "unfit")
PROGRAM = "python -m filterwise.lab.compatibility"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command."""
    app(prog_name=PROGRAM)


@app.command(epilog=f"Example: {PROGRAM} --only 'timm/resnet1*' --page resnets.md")
def compatibility(
    the_sample: Annotated[
        bool, typer.Option("--sample", help="The few that the tests examine.")
    ] = False,
    families: Annotated[
        bool, typer.Option("--families", help="The smallest of each family; the default.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="All below 100 M parameters, families first.")
    ] = False,
    only: Annotated[
        str, typer.Option(help="Shell pattern on library/name: those of all that match.")
    ] = "",
    recipes: Annotated[str, typer.Option(help="Recipes with commas between them.")] = ",".join(
        RECIPES
    ),
    out: Annotated[Path, typer.Option(help="Folder of what was found.")] = Path(
        "runs/compatibility"
    ),
    to: Annotated[Path, typer.Option("--page", help="The page to write.")] = Path(
        "docs/compatibility.md"
    ),
    processes: Annotated[
        int, typer.Option(help="Architectures at a time, each with one thread.", min=1)
    ] = cores(),
    seconds: Annotated[
        float, typer.Option(help="Limit for one architecture and recipe.", min=1)
    ] = 300,
    minutes: Annotated[
        float | None, typer.Option(help="Start nothing after so many minutes.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Leave out what is in the folder already, unless it failed."),
    ] = True,
) -> None:
    """Examine which models of timm and torchvision convert, train and fold, and write the page.

    Given again, the same command carries on: what failed is examined again, the rest is not. Exit
    code 1 says that something failed.
    """
    terminal = Terminal()
    try:
        if sum((the_sample, families, every, bool(only))) > 1:
            raise UsageError("give one of --sample, --families, --all and --only.")
        chosen = tuple(word.strip() for word in recipes.split(","))
        if unknown := [word for word in chosen if word not in RECIPES]:
            raise UsageError(f"--recipes: {unknown[0]!r} is none of {', '.join(RECIPES)}.")
        records = Records(out)
        end = None if minutes is None else time.monotonic() + 60 * minutes

        def is_over() -> bool:
            return end is not None and time.monotonic() > end

        with records.claim():
            choice = (the_sample, every, only)
            scope = _scope(records, terminal, processes, choice, chosen, is_over)
            try:
                _examine(scope, records, terminal, chosen, processes, seconds, is_over, resume)
            finally:
                _write(to, page(scope, records.pairs()))
        _tell(scope, records, terminal, chosen, to)
    except LabError as error:
        terminal.fail(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        terminal.fail("interrupted; the same command carries on.")
        raise typer.Exit(130) from None


def _scope(
    records: Records,
    terminal: Terminal,
    processes: int,
    choice: tuple[bool, bool, str],
    recipes: Sequence[str],
    stop: Callable[[], bool],
) -> Scope:
    the_sample, every_one, only = choice
    every = all_architectures()
    named = sample(every) if the_sample else [one for one in every if fnmatchcase(str(one), only)]
    if only and not named:
        raise UsageError(f"--only {only!r} matches none of {len(every)} architectures.")
    parameters = _sizes(named or every, records, terminal, processes, stop)
    small = {name: count for name, count in parameters.items() if count < LARGEST}
    if the_sample:
        wanted = named
    elif only:
        wanted = [one for one in named if str(one) in small]
    else:
        wanted = representatives(every, small)
        if every_one:
            first = set(wanted)
            rest = [one for one in every if str(one) in small and one not in first]
            wanted += sorted(rest, key=lambda one: small[str(one)])
    command = f"{PROGRAM} {shlex.join(_words(choice, recipes))}"
    large = len(parameters) - len(small)
    return Scope(command, wanted, every, large, LARGEST, records.about)


def _words(choice: tuple[bool, bool, str], recipes: Sequence[str]) -> list[str]:
    """Return the options that say what is examined; where and how fast is nobody else's matter."""
    the_sample, every_one, only = choice
    words = ["--sample" if the_sample else "--all" if every_one else "--families"]
    if only:
        words = ["--only", only]
    return words if tuple(recipes) == RECIPES else [*words, "--recipes", ",".join(recipes)]


def _sizes(
    architectures: Sequence[Architecture],
    records: Records,
    terminal: Terminal,
    processes: int,
    stop: Callable[[], bool],
) -> Mapping[str, int]:
    """Return how many parameters each architecture has; what is not known yet is counted."""
    known = records.sizes()
    missing = [one for one in architectures if str(one) not in known]
    if missing:
        terminal.say(f"Counting the parameters of {len(missing)} architectures.")
    with terminal.progress("counting", len(missing)) as advance:
        for one, _, found in count_all(missing, processes, 300, stop):
            records.add_size(one, found)
            advance(1)
    known = records.sizes()
    if left := sum(str(one) not in known for one in architectures):
        raise LabError(f"time is up: {left} architectures are not counted. Give the command again.")
    return {name: line["parameters"] for name, line in known.items() if "parameters" in line}


def _examine(
    scope: Scope,
    records: Records,
    terminal: Terminal,
    recipes: Sequence[str],
    processes: int,
    seconds: float,
    stop: Callable[[], bool],
    resume: bool,
) -> None:
    done = records.finished() if resume else set()
    jobs = [
        Job(one, left)
        for one in scope.wanted
        if (left := [recipe for recipe in recipes if (str(one), recipe) not in done])
    ]
    total = sum(len(job.words) for job in jobs)
    terminal.say(f"{total} pairs of architecture and recipe to examine.")
    code = source_digest()
    with terminal.progress("examining", total) as advance:
        for one, recipe, found in examine_all(jobs, processes, seconds, stop):
            records.add_pair(one, recipe, found, code)
            if found["outcome"] != "passed":
                words = f"{found['outcome']}, {found['step']}: {found['reason']}"
                terminal.say(f"{one}, {recipe}: {words}")
            advance(1)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{path.parent} cannot be made: {error}.") from None
    write_whole(path, text.encode())


def _tell(
    scope: Scope, records: Records, terminal: Terminal, recipes: Sequence[str], to: Path
) -> None:
    """Say how it went.

    Raises:
        LabError: If a pair failed.
    """
    pairs = records.pairs()
    wanted = [(str(one), recipe) for one in scope.wanted for recipe in recipes]
    outcomes = [pairs[pair]["outcome"] for pair in wanted if pair in pairs]
    for word in OUTCOMES:
        terminal.print(f"{word}: {outcomes.count(word)}")
    terminal.print(f"left: {len(wanted) - len(outcomes)}")
    terminal.print(f"Page: {to}")
    if failed := outcomes.count("failed"):
        raise LabError(f"{failed} pairs failed.")
