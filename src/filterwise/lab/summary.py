"""Medians, quartiles and differences: what a set of runs says, and what it cannot say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy

from filterwise.lab.engine import unpacked
from filterwise.lab.statistics import RESAMPLES, quartiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from filterwise.lab.data import PictureSet
    from filterwise.lab.results import Record
    from filterwise.lab.settings import Panel
    from filterwise.lab.timing import StepTime

__all__ = ["Cell", "Difference", "EpochPoint", "Row", "Summary", "Table", "summarize"]

NORMAL_95 = 1.96


class Cell(NamedTuple):
    """One recipe in one panel: the runs over all seeds."""

    panel: Panel
    recipe: str


class EpochPoint(NamedTuple):
    """Test errors after one epoch over the seeds that finished it, from 0 to 1."""

    epoch: int
    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Row:
    """One recipe's line in a table; errors from 0 to 1.

    Attributes:
        recipe: Canonical text.
        seeds: Number of runs.
        median: Of the test error; None where the network cannot be trained under these settings.
        lower: First quartile.
        upper: Third quartile.
        errors: Of each seed, in their order.
        diverged: Runs whose loss stopped being finite; their error counts as it then stood.
        failed: Why the network cannot be trained.
        step: Step time beside the plain network's; None if it was not measured.
        curve: Error by epoch.
        conversion: What the recipe did to the network, in one line.
    """

    recipe: str
    seeds: int
    median: float | None
    lower: float | None
    upper: float | None
    errors: tuple[float, ...]
    diverged: int
    failed: str | None
    step: StepTime | None
    curve: tuple[EpochPoint, ...]
    conversion: str


@dataclass(frozen=True)
class Table:
    """All recipes of one panel.

    Attributes:
        number: Its place, from 1.
        panel: What they have in common.
        rows: In the order in which the recipes were given.
    """

    number: int
    panel: Panel
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The table's heading."""
        return f"Table {self.number}: {self.panel.title}"

    @property
    def rounds(self) -> int:
        """In how many rounds the steps were timed; 0 if they were not."""
        return max((row.step.rounds for row in self.rows if row.step), default=0)

    def trained(self) -> list[Row]:
        """Return the rows that have an error, best first."""
        return sorted(
            (row for row in self.rows if row.median is not None),
            key=lambda row: (row.median or 0.0, row.recipe),
        )


@dataclass(frozen=True)
class Difference:
    """How much one cell's median error is above another's.

    Attributes:
        points: Difference of the medians, in percentage points.
        low: Lower end of its 95 % interval.
        high: Upper end.
        seen: Whether the interval leaves zero out and the difference is above what chance does with
            so few pictures.
    """

    points: float
    low: float
    high: float
    seen: bool


class Summary:
    """Tables of all panels, and differences between any two of their cells.

    Intervals are percentiles of a bootstrap over test pictures and seeds, both paired: all networks
    saw the same pictures, and one seed gives all recipes the same first weights and order.
    """

    def __init__(self, tables: Sequence[Table], data: PictureSet, samples: Mapping[Cell, object]):
        """Take the tables and, by cell, the bootstrap's medians."""
        self.tables = tuple(tables)
        self.pictures = len(data.test_labels)
        self.chance = data.chance
        self._samples = samples
        self._medians = {
            Cell(table.panel, row.recipe): row.median for table in tables for row in table.rows
        }

    def noise(self, error: float) -> float:
        """Return the percentage points under which a difference means nothing.

        Two networks that are wrong on a share p of n pictures each, half of them the same ones,
        differ by a random amount with standard deviation sqrt(p / n); 95 % of such differences are
        smaller than 1.96 times that.
        """
        at_least_one = max(error, 1 / self.pictures)
        return 100 * NORMAL_95 * math.sqrt(at_least_one / self.pictures)

    def difference(self, cell: Cell, other: Cell) -> Difference | None:
        """Return how far `cell` is above `other`; None where one of them has no error."""
        mine, theirs = self._medians.get(cell), self._medians.get(other)
        if mine is None or theirs is None:
            return None
        spread = 100 * (numpy.asarray(self._samples[cell]) - numpy.asarray(self._samples[other]))
        low, high = (float(end) for end in numpy.percentile(spread, (2.5, 97.5)))
        points = 100 * (mine - theirs)
        beyond_chance = abs(points) >= self.noise(min(mine, theirs))
        return Difference(points, low, high, beyond_chance and (low > 0 or high < 0))


def summarize(
    panels: Sequence[Panel],
    recipes: Sequence[str],
    records: Sequence[Record],
    data: PictureSet,
    steps: Mapping[Cell, StepTime],
) -> Summary:
    """Make the tables of a comparison whose runs are all there."""
    runs: dict[Cell, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.settings.seed):
        runs.setdefault(Cell(record.settings.panel, record.settings.recipe), []).append(record)
    tables = [
        Table(
            number,
            panel,
            tuple(
                _row(runs[Cell(panel, recipe)], steps.get(Cell(panel, recipe)))
                for recipe in recipes
            ),
        )
        for number, panel in enumerate(panels, start=1)
    ]
    return Summary(tables, data, _bootstrap(runs, len(data.test_labels)))


def _row(runs: Sequence[Record], step: StepTime | None) -> Row:
    first = runs[0]
    errors = tuple(run.outcome.error for run in runs if run.outcome.error is not None)
    failed = next((run.outcome.failed for run in runs if run.outcome.failed), None)
    lower, median, upper = quartiles(errors) if errors and not failed else (None, None, None)
    return Row(
        recipe=first.settings.recipe,
        seeds=len(runs),
        median=median,
        lower=lower,
        upper=upper,
        errors=errors,
        diverged=sum(run.outcome.diverged_at is not None for run in runs),
        failed=failed,
        step=step,
        curve=_curve(runs),
        conversion=first.outcome.conversion,
    )


def _curve(runs: Sequence[Record]) -> tuple[EpochPoint, ...]:
    by_epoch: dict[int, list[float]] = {}
    for run in runs:
        for point in run.outcome.curve:
            by_epoch.setdefault(point.epoch, []).append(point.test_error)
    points = []
    for epoch, errors in sorted(by_epoch.items()):
        lower, median, upper = quartiles(errors)
        points.append(EpochPoint(epoch, median, lower, upper))
    return tuple(points)


def _bootstrap(runs: Mapping[Cell, Sequence[Record]], pictures: int) -> dict[Cell, object]:
    cells = {
        cell: numpy.array([unpacked(run.outcome.wrong, pictures) for run in group], numpy.float32)
        for cell, group in runs.items()
        if not any(run.outcome.failed for run in group)
    }
    generator = numpy.random.default_rng(0)
    seeds = max((len(wrong) for wrong in cells.values()), default=1)
    samples: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, pictures, pictures)
        weights = numpy.bincount(drawn, minlength=pictures).astype(numpy.float32) / pictures
        chosen = generator.integers(0, seeds, seeds)
        for cell, wrong in cells.items():
            samples[cell].append(float(numpy.median((wrong @ weights)[chosen % len(wrong)])))
    return dict(samples)
