"""What a person sees while a comparison runs and when it is done."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

import filterwise as fw
from filterwise.errors import ConversionError, RecipeError
from filterwise.lab.errors import LabError
from filterwise.lab.reading import percent
from filterwise.report import text_table

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from filterwise.lab.reading import Sentence
    from filterwise.lab.summary import Row, Summary

__all__ = ["Terminal", "one_line"]

# Not shortened and not wrapped where nobody looks at a screen.
PIPED_WIDTH = 100_000
HEADINGS = {
    "against": "What speaks against normalizing weights",
    "for": "What speaks for it",
    "note": "What else there is to see",
}


class Terminal:
    """Results on standard output, everything else on standard error.

    Colours, bars and wrapped cells only where the output is a terminal.
    """

    def __init__(self) -> None:
        """Open both."""
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def say(self, line: str) -> None:
        """Write a line of progress."""
        self.err.print(Text(line))

    def warn(self, line: str) -> None:
        """Write a line that asks for attention."""
        self.err.print(Text("note: ", style="yellow").append(Text(line, style="default")))

    def fail(self, message: str) -> None:
        """Write why the command ends here."""
        self.err.print(Text("filterwise: ", style="bold red").append(Text(message, style="none")))

    def print(self, line: str = "") -> None:
        """Write a line of the result."""
        self.out.print(Text(line))

    def raw(self, text: str) -> None:
        """Write text to standard output as it is."""
        sys.stdout.write(text + "\n")

    @contextmanager
    def progress(self, what: str, total: float) -> Iterator[Callable[[float], None]]:
        """Show a bar with an estimate of the time left; nothing where there is no terminal.

        Yields:
            A function to call with the work done since the last call.
        """
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
            # A run takes seconds: over a short window the estimate would jump with each one.
            speed_estimate_period=600,
            disable=not self.err.is_terminal,
        )
        with bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, advance=done)

    def table(
        self,
        title: str,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        right: Collection[str] = (),
    ) -> None:
        """Write a table under a title."""
        self.out.print(Text(title, style="bold"))
        if not self.out.is_terminal:
            self.raw(text_table(headers, rows, right=right))
            return
        table = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for header in headers:
            table.add_column(
                header, justify="right" if header in right else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.out.print(table)

    def fields(self, rows: Sequence[tuple[str, str]]) -> None:
        """Write texts behind their names."""
        if self.out.is_terminal:
            self.out.print(_hanging(rows))
            return
        for name, text in rows:
            self.out.print(Text(f"{name} {text}"))

    def summary(self, summary: Summary) -> None:
        """Write the tables of a comparison."""
        headers = ("recipe", "error %", "quartiles", "seeds", "diverged", "step time", "quartiles")
        for table in summary.tables:
            self.table(
                table.title,
                headers,
                [_cells(row) for row in table.rows],
                right=set(headers[1:]),
            )
            self.print()
        self.print(_legend(summary))
        self.print()

    def reading(self, sentences: Sequence[Sentence]) -> None:
        """Write the plain reading, what speaks against the methods first."""
        for side, heading in HEADINGS.items():
            mine = [sentence.text for sentence in sentences if sentence.side == side]
            if mine:
                self.out.print(Text(heading, style="bold"))
            for text in mine:
                self.fields([("-", text)])
            if mine:
                self.print()


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, emoji=False, width=PIPED_WIDTH)
    return console


def _hanging(rows: Sequence[tuple[str, str]]) -> RichTable:
    """Lay out texts beside their names, wrapped lines under the text and not the name."""
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(name), Text(text))
    return grid


def _legend(summary: Summary) -> str:
    rounds = sorted({table.rounds for table in summary.tables})
    over = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return (
        "Error: median and quartiles over the seeds, after the last epoch; a diverged run counts"
        " with the error its network then has. Step time: an optimizer step by the plain network's,"
        f" measured afterwards in one process with the recipes taking turns, over {over} rounds."
    )


def _cells(row: Row) -> list[str]:
    if row.failed:
        return [row.recipe, "failed", "-", str(row.seeds), "-", "-", "-"]
    cells = [
        row.recipe,
        percent(row.median),
        f"{percent(row.lower)} to {percent(row.upper)}",
        str(row.seeds),
        f"{row.diverged} of {row.seeds}",
    ]
    if row.step is None:
        return [*cells, "-", "-"]
    return [
        *cells,
        f"{row.step.ratio:.2f}",
        f"{row.step.lower:.2f} to {row.step.upper:.2f}",
    ]


@contextmanager
def one_line(terminal: Terminal) -> Iterator[None]:
    """Turn what a person can mend into one message and an exit code; show no traceback for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fw.FilterwiseWarning)
            yield
    except (RecipeError, ConversionError) as error:
        terminal.fail(str(error))
        raise typer.Exit(2) from None
    except LabError as error:
        terminal.fail(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        terminal.fail("Stopped. What finished is kept; the same command carries on.")
        raise typer.Exit(1) from None
