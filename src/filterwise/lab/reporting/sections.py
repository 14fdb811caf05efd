"""What stands in a report, as texts: the same for page, Markdown and terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from filterwise.lab.reporting import words
from filterwise.lab.reporting.differences import means, pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from filterwise.lab.reporting.tables import Line, Table
    from filterwise.lab.reproduce.schema import Metric
    from filterwise.lab.statistics import Interval

__all__ = ["Grid", "Section", "section"]

PAPER = ("paper", "ours \N{MINUS SIGN} paper")
LEFT = {PAPER[0], PAPER[1], "against", "difference", "in the paper", "they also differ in", "rows"}
"""Columns of words; those of numbers end at the right."""


@dataclass(frozen=True)
class Grid:
    """A table of texts.

    Attributes:
        name: Unique in the report.
        caption: What is in it, with the budget.
        headers: Of the columns; the first holds the rows' names.
        rows: As many texts in each.
        right: Whether a column's texts end at the right.
    """

    name: str
    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def right(self) -> tuple[bool, ...]:
        """Whether each column holds numbers."""
        return tuple(place > 0 and each not in LEFT for place, each in enumerate(self.headers))


@dataclass(frozen=True)
class Section:
    """A recipe at one budget.

    Attributes:
        table: The numbers.
        title: Heading.
        budget: The label that stands wherever its numbers stand.
        lead: What it is, and what may be said of it.
        reading: What the numbers say, a sentence each.
        ours: What the runs came to.
        apart: The paper's numbers where they must not stand beside ours; else None.
        derived: Means and differences between rows.
        shrunk: What is smaller than in the paper; None at the paper's set-up.
        deviations: Everything else that is not as in the paper or not known to be.
        constants: What the paper says of these runs, by name.
        silent: What the paper leaves open: what, the choice, why.
        notes: Doubts about the paper's numbers.
    """

    table: Table
    title: str
    budget: str
    lead: str
    reading: tuple[str, ...]
    ours: tuple[Grid, ...]
    apart: tuple[Grid, ...]
    derived: tuple[Grid, ...]
    shrunk: Grid | None
    deviations: tuple[str, ...]
    constants: tuple[tuple[str, str], ...]
    silent: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]


def section(table: Table) -> Section:
    """Write a table."""
    recipe, experiment = table.recipe, table.experiment
    silent = [*experiment.paper.silent, *experiment.recipe.silent] if experiment else []
    notes = [*experiment.paper.notes, *experiment.recipe.notes] if experiment else []
    return Section(
        table,
        title=f"{table.id}: {recipe.title}" if recipe else table.id,
        budget=words.BUDGET[table.budget],
        lead=_lead(table),
        reading=tuple(_reading(table)),
        ours=tuple(_ours(table)),
        apart=() if table.comparable else tuple(_apart(table)),
        derived=tuple(each for each in (_means(table), *_pairs(table)) if each),
        shrunk=_shrunk(table),
        deviations=tuple(_deviations(table)),
        constants=tuple(_constants(table)),
        silent=tuple((each.what, each.choose, each.why) for each in silent),
        notes=tuple(notes),
    )


def _lead(table: Table) -> str:
    runs = table.records
    seeds = sorted({record.run.settings.seed for record in runs})
    parts = []
    if table.experiment:
        paper = table.experiment.paper
        parts.append(f"{paper.title} ({paper.authors}), {table.experiment.recipe.where}.")
    parts.append(f"{words.count(len(runs), 'run')}, {words.count(len(seeds), 'seed')}.")
    if not table.comparable:
        parts.append(
            "These runs are smaller than the paper's: its numbers stand apart, and no difference"
            " from them is formed."
        )
    return " ".join(parts)


def _constants(table: Table) -> Iterator[tuple[str, str]]:
    if table.experiment:
        said = table.experiment.paper.constants | table.experiment.recipe.constants
        yield from said.items()
        if table.experiment.recipe.draws:
            yield "what is drawn", table.experiment.recipe.draws


def _ours(table: Table) -> Iterator[Grid]:
    for name, metric in table.metrics.items():
        lines = [line for line in table.lines if line.metrics[name].by_seed or line.failed]
        if not lines:
            continue
        spread = metric.statistic == "iqr"
        ours = ("distance of quartiles",) if spread else ("median", "quartiles")
        headers = (*ours, "seeds", "diverged", *(() if spread else ("best epoch",)))
        yield Grid(
            f"{table.name}-{words.slug(name)}",
            f"{table.id}, {words.heading(metric)} [{table.budget}]",
            ("row", *headers, *(PAPER if table.comparable else ())),
            tuple(_row(table, line, name, metric) for line in lines),
        )


def _row(table: Table, line: Line, name: str, metric: Metric) -> tuple[str, ...]:
    decimals, found = words.digits(metric), line.metrics[name]
    seeds = len(line.runs)
    cells = [line.name, words.number(found.value, decimals)]
    if line.failed:
        cells[1] = f"cannot be trained: {line.failed}"
    spread = metric.statistic == "iqr"
    cells += [] if spread else [words.between(found.spread, decimals)]
    cells += [str(seeds), f"{line.diverged} of {seeds}"]
    cells += [] if spread else [words.number(found.best, decimals)]
    if table.comparable:
        cells += [words.printed(found.paper, decimals), words.interval(found.difference, decimals)]
    return tuple(cells)


def _apart(table: Table) -> Iterator[Grid]:
    """Give the paper's numbers a table of their own."""
    if table.recipe is None:
        return
    for name, metric in table.metrics.items():
        rows = [
            (row.label, words.printed(row.paper[name], words.digits(metric)))
            for row in table.recipe.rows
            if name in row.paper
        ]
        if rows:
            yield Grid(
                f"{table.name}-{words.slug(name)}-paper",
                f"What the paper has, in its own set-up: {words.heading(metric)}."
                f" Not comparable with the {table.budget} runs",
                ("row", PAPER[0]),
                tuple(rows),
            )


def _means(table: Table) -> Grid | None:
    found = means(table)
    if not found:
        return None
    return Grid(
        f"{table.name}-means",
        f"{table.id}, means over rows [{table.budget}]",
        ("mean", "median", "quartiles", "seeds", *(PAPER if table.comparable else ())),
        tuple(
            (
                each.label,
                words.number(each.spread.median),
                words.between(each.spread),
                str(each.seeds),
                *(
                    (words.printed(each.paper), words.interval(each.difference))
                    if table.comparable
                    else ()
                ),
            )
            for each in found
        ),
    )


def _pairs(table: Table) -> Iterator[Grid]:
    found = pairs(table)
    for name, metric in table.metrics.items():
        mine = [pair for pair in found if pair.metric == name]
        if not mine:
            continue
        decimals = words.digits(metric)
        with_paper = ("in the paper",) if table.comparable else ()
        yield Grid(
            f"{table.name}-{words.slug(name)}-differences",
            f"{table.id}, differences between rows: {words.heading(metric)} [{table.budget}]",
            ("row", "against", "difference", "seeds", *with_paper, "they also differ in"),
            tuple(
                (
                    pair.line.name,
                    pair.other.name,
                    words.interval(pair.difference, decimals),
                    str(pair.seeds),
                    *((words.moved(pair.paper, decimals),) if table.comparable else ()),
                    ", ".join(pair.differing) or "nothing",
                )
                for pair in mine
            ),
        )


def _shrunk(table: Table) -> Grid | None:
    """Say what is smaller than in the paper, once where it is so in all rows."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for line in table.lines:
        for name, (paper, here) in line.shrunk.items():
            key = (name, words.value(paper), words.value(here))
            found.setdefault(key, []).append(line.name)
    if not found:
        return None
    return Grid(
        f"{table.name}-shrunk",
        f"{table.id}, what is smaller than in the paper [{table.budget}]",
        ("setting", "paper", "here", "rows"),
        tuple(
            (*key, "all" if len(names) == len(table.lines) else ", ".join(names))
            for key, names in found.items()
        ),
    )


def _reading(table: Table) -> Iterator[str]:
    for line in table.lines:
        runs = words.count(len(line.runs), "run")
        if line.failed:
            yield f"{words.quoted([line.name])} cannot be trained: {line.failed}."
        elif line.diverged:
            yield f"{words.quoted([line.name])} diverged in {line.diverged} of {runs}."
    for name, metric in table.metrics.items():
        kinds: dict[str, list[str]] = {}
        for line in table.lines:
            difference = line.metrics[name].difference
            if difference is not None:
                kinds.setdefault(_verdict(difference), []).append(line.name)
        if kinds:
            said = "; ".join(f"{kind} {words.quoted(names)}" for kind, names in kinds.items())
            yield f"{metric.title}, beside the paper: {said}."


def _verdict(difference: Interval) -> str:
    if difference.low is None:
        return "one seed, which tells nothing of the spread, in"
    if not difference.seen:
        return "no difference seen in"
    return "lower in" if difference.value < 0 else "higher in"


def _deviations(table: Table) -> Iterator[str]:
    if table.experiment is None:
        yield (
            f"This program has no recipe {table.id}: what the paper has, and what it leaves open,"
            " is not known here."
        )
        return
    if table.outdated:
        yield (
            f"{words.count(table.outdated, 'run was', 'runs were')} made under another version of"
            " the recipe's file than this program has."
        )
    wanted = table.experiment.seeds
    if table.comparable:
        few = [line.name for line in table.lines if len(line.runs) < wanted]
        if few:
            yield f"Fewer seeds than the {wanted} of the recipe: {words.quoted(few)}."
    for line in table.lines:
        if line.added:
            yield f"The paper has no row {words.quoted([line.label])}; it was added: {line.added}"
    for label, why in table.not_run.items():
        yield f"{words.quoted([label])} is not run: {why}"
    if table.missing:
        rows = words.count(len(table.missing), "row has", "rows have")
        yield f"{rows} no run yet: {words.quoted(table.missing)}."
