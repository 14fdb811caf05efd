"""A benchmark as a command: options, progress, a table, a JSON record, an exit code."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from filterwise.lab.errors import LabError, UsageError, reason
from filterwise.lab.hardware import hardware, versions
from filterwise.lab.results import write_whole
from filterwise.lab.terminal import Terminal
from harness.machine import IDLE, Watch, commit
from harness.timing import Rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness.timing import Spread

__all__ = ["Options", "Outcome", "Table", "bracketed", "names", "numbers", "options", "run"]

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass
class Table:
    """Rows as a person reads them; the first `left` columns are words, the rest numbers."""

    title: str
    headers: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    left: int = 1


@dataclass
class Outcome:
    """What a benchmark found.

    Attributes:
        tables: For the reader.
        rows: Plain data, with the time of every round: for the record.
        notes: Sentences on what was left out, and why.
    """

    tables: list[Table] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Options(argparse.ArgumentParser):
    """A parser that refuses in one line and names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized") and unknown.startswith("-"):
            near = get_close_matches(unknown.partition("=")[0], self._option_string_actions, n=1)
            message = f"there is no option {unknown}" + (f"; nearest: {near[0]}" if near else "")
        self.exit(2, f"{self.prog}: {message}. --help lists the options.\n")


def options(about: str, rounds: Rounds | None = None, threads: int | None = None) -> Options:
    """Return a parser with the options that every benchmark has."""
    rounds = rounds or Rounds()
    parser = Options(
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--rounds", type=_at_least(1), default=rounds.most, help="rounds at most")
    add("--least", type=_at_least(1), default=rounds.least, help="rounds in any case")
    add(
        "--seconds",
        type=float,
        default=rounds.seconds,
        help="per table, after which no further round begins",
    )
    add("--threads", type=_at_least(1), default=threads or torch.get_num_threads(), help="of torch")
    add("--device", default="cpu", help="cpu or cuda")
    add("--autocast", action="store_true", help="bfloat16 autocast")
    add("--compile", action="store_true", help="torch.compile every model")
    add("--quick", action="store_true", help="toy sizes: shows that it runs, measures nothing")
    add("--out", type=Path, help="JSON file (default: a name that says what, in results/)")
    return parser


def numbers(text: str) -> list[int]:
    """Read whole numbers of at least 1, separated by commas."""
    return [_at_least(1)(word) for word in text.split(",")]


def names(text: str) -> list[str]:
    """Read words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
        return value

    return read


def bracketed(spread: Spread, digits: int = 3) -> str:
    """Write a median with its quartiles."""
    return f"{spread.median:.{digits}f} [{spread.lower:.{digits}f} {spread.upper:.{digits}f}]"


def run(
    benchmark: str,
    parser: Options,
    measure: Callable[[argparse.Namespace, Rounds, Terminal], Outcome],
    words: Sequence[str] | None = None,
) -> int:
    """Run a benchmark as a command.

    Args:
        benchmark: Its name, as in the record.
        parser: Its options.
        measure: What measures.
        words: The command's words; None takes the process's own.

    Returns:
        Exit code: 0, 1 if something failed, 2 if it was asked for something that there is not.
    """
    words = list(sys.argv[1:] if words is None else words)
    asked = parser.parse_args(words)
    terminal = Terminal()
    threads = torch.get_num_threads()
    try:
        _check(asked)
        torch.set_num_threads(asked.threads)
        path = _path(benchmark, asked)
        watch = Watch()
        outcome = measure(asked, _rounds(asked), terminal)
        machine = watch.seen()
        _show(outcome, machine, terminal, quick=asked.quick)
        _write(path, benchmark, words, asked, outcome, machine)
        terminal.say(f"written: {path}")
    except LabError as error:
        terminal.err.print(f"{benchmark}.py: {error}", markup=False, soft_wrap=True)
        return error.exit_code
    finally:
        torch.set_num_threads(threads)
    return 0


def _rounds(asked: argparse.Namespace) -> Rounds:
    if asked.quick:
        return Rounds(2, 2)
    return Rounds(asked.rounds, min(asked.least, asked.rounds), asked.seconds)


def _check(asked: argparse.Namespace) -> None:
    try:
        kind = torch.device(asked.device).type
    except RuntimeError:
        raise UsageError(f"--device: there is no device {asked.device!r}; cpu or cuda.") from None
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device: benchmarks run on cpu or cuda, not on {kind}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: torch finds no CUDA device here.")
    if not asked.seconds > 0:
        raise UsageError(f"--seconds: must be above 0, got {asked.seconds:g}.")


def _path(benchmark: str, asked: argparse.Namespace) -> Path:
    """Return where the record goes, and see now, not after an hour, that it can be written."""
    path = asked.out
    if path is None:
        parts = [benchmark, torch.device(asked.device).type]
        parts += ["bf16"] * asked.autocast + ["compiled"] * asked.compile + ["quick"] * asked.quick
        path = RESULTS / f"{'-'.join(parts)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UsageError(f"--out: {path} cannot be written: {reason(error)}.") from None
    if path.stat().st_size == 0:
        path.unlink()
    return path


def _show(outcome: Outcome, machine: dict[str, Any], terminal: Terminal, *, quick: bool) -> None:
    for table in outcome.tables:
        terminal.table(
            table.title, table.headers, table.rows, right=set(table.headers[table.left :])
        )
        terminal.print()
    for note in outcome.notes:
        terminal.warn(note)
    if quick:
        terminal.warn("--quick: toy sizes and two rounds; these figures mean nothing.")
    if machine["idle"] is None:
        terminal.warn("whether the machine was idle cannot be told on this system.")
    elif not machine["idle"]:
        terminal.warn(
            f"the machine was not idle: other processes took {machine['other_cores']:.2f} cores"
            f" (idle: up to {IDLE:g}). These figures are not to be quoted."
        )


def _write(
    path: Path,
    benchmark: str,
    words: Sequence[str],
    asked: argparse.Namespace,
    outcome: Outcome,
    machine: dict[str, Any],
) -> None:
    record = {
        "benchmark": benchmark,
        "command": shlex.join(["python", f"benchmarks/{benchmark}.py", *words]),
        **commit(),
        **machine,
        "versions": versions(),
        "hardware": hardware(torch.device(asked.device)),
        "options": {key: _plain(value) for key, value in vars(asked).items() if key != "out"},
        "notes": outcome.notes,
        "tables": [asdict(table) for table in outcome.tables],
        "rows": outcome.rows,
    }
    write_whole(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value
