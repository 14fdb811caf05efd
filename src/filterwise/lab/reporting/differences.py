"""What is made out of several rows: differences between them, and their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from filterwise.lab.reporting.settings import unequal
from filterwise.lab.statistics import Interval, Quartiles, from_value, paired, quartiles
from filterwise.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from filterwise.lab.reporting.tables import Line, Table
    from filterwise.lab.reproduce.schema import Mean, PaperValue

__all__ = ["MeanLine", "Pair", "means", "pairs"]

RECIPE = "model.recipe"


@dataclass(frozen=True)
class Pair:
    """Two lines under the same conditions, with and without a method or with another norm.

    Attributes:
        metric: Name of what is compared.
        line: The line with the method.
        other: What it is measured against.
        difference: Of the medians over the seeds that both have, `line` minus `other`.
        seeds: How many those are.
        paper: The same difference in the paper; None unless this is its set-up and it has both.
        differing: Settings in which they differ besides the recipe.
    """

    metric: str
    line: Line
    other: Line
    difference: Interval
    seeds: int
    paper: float | None
    differing: tuple[str, ...]


@dataclass(frozen=True)
class MeanLine:
    """A mean over several rows.

    Attributes:
        label: As the paper calls it.
        seeds: How many have a run in every row.
        spread: Quartiles over those seeds of the mean over the rows.
        paper: The paper's mean.
        difference: From the paper's; None unless this is its set-up.
    """

    label: str
    seeds: int
    spread: Quartiles
    paper: PaperValue
    difference: Interval | None


def pairs(table: Table) -> list[Pair]:
    """Return every line with a method against its own norm alone, and against batch norm.

    Only lines under the same conditions are paired, and only in metrics that are a median.
    """
    return [
        pair
        for line in table.lines
        for other in _references(table, line)
        for name in table.metrics
        if (pair := _pair(table, name, line, other)) is not None
    ]


def means(table: Table) -> list[MeanLine]:
    """Return the recipe's means for which every row has a run under one setting."""
    found = (_mean(table, mean) for mean in (table.recipe.means if table.recipe else ()))
    return [each for each in found if each is not None]


def _references(table: Table, line: Line) -> Iterator[Line]:
    norm, method = _kind(line)
    if method is None:
        return
    # A method without a norm stands against the net as it is, which has none either: "keep".
    alone = {"none", "keep"} if norm == "none" else {norm}
    for other in table.lines:
        other_norm, other_method = _kind(other)
        same_place = other.at == line.at and other.variant == line.variant
        if same_place and other_method is None and other_norm in {*alone, "bn"}:
            yield other


def _kind(line: Line) -> tuple[str, object]:
    parsed = Recipe.parse(line.settings[RECIPE])
    return parsed.norm, parsed.method


def _pair(table: Table, name: str, line: Line, other: Line) -> Pair | None:
    metric = table.metrics[name]
    mine, theirs = line.metrics[name], other.metrics[name]
    difference = paired(mine.by_seed, theirs.by_seed)
    if difference is None or metric.statistic != "median":
        return None
    paper = None
    if table.comparable and mine.paper and theirs.paper:
        ours, base = mine.paper.value, theirs.paper.value
        paper = ours - base if ours is not None and base is not None else None
    differing = unequal([line.settings, other.settings])
    return Pair(
        name,
        line,
        other,
        difference,
        len(mine.by_seed.keys() & theirs.by_seed.keys()),
        paper,
        tuple(each for each in differing if each != RECIPE),
    )


def _mean(table: Table, mean: Mean) -> MeanLine | None:
    lines = [line for line in table.lines if line.label in mean.rows]
    if sorted(line.label for line in lines) != sorted(mean.rows):
        return None
    values: list[Mapping[int, float]] = [
        line.metrics[name].by_seed
        for line in lines
        for name, metric in table.metrics.items()
        if metric.statistic == "median" and line.metrics[name].by_seed
    ]
    seeds = set.intersection(*(set(each) for each in values)) if values else set()
    if not seeds:
        return None
    by_seed = [float(numpy.mean([each[seed] for each in values])) for seed in sorted(seeds)]
    value = mean.paper.value
    comparable = table.comparable and value is not None
    return MeanLine(
        mean.label,
        len(by_seed),
        quartiles(by_seed),
        mean.paper,
        from_value(by_seed, value) if comparable and value is not None else None,
    )
