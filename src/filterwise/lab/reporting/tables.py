"""Tables: every row of a recipe with what its runs came to, at one budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from filterwise.lab.reporting.settings import plain, unequal
from filterwise.lab.reporting.words import slug
from filterwise.lab.reproduce.schema import Metric
from filterwise.lab.statistics import Interval, Quartiles, from_value, quartiles, statistic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from filterwise.lab.reproduce.experiments import Experiment
    from filterwise.lab.reproduce.records import Budget, ReproduceRecord
    from filterwise.lab.reproduce.schema import PaperValue, ReproduceRecipe, Row

__all__ = ["BUDGETS", "Line", "Measured", "Table", "tables"]

BUDGETS: tuple[Budget, ...] = ("full", "short", "smoke")


@dataclass(frozen=True)
class Measured:
    """What the runs of a row came to in one metric, in the paper's unit.

    Attributes:
        by_seed: Of each seed after the last epoch, or where it diverged.
        spread: Quartiles over the seeds; None where no run has a value.
        value: What is set beside the paper's number: the median, or the distance of the quartiles.
        best: Median over the seeds of the best epoch's value.
        paper: The paper's number.
        difference: Of `value` from the paper's; None unless this is the paper's set-up and both
            have a number.
    """

    by_seed: dict[int, float]
    spread: Quartiles | None
    value: float | None
    best: float | None
    paper: PaperValue | None
    difference: Interval | None


@dataclass(frozen=True)
class Line:
    """A row of a recipe under one setting.

    Attributes:
        label: Of the row.
        method: As the paper calls it; the label where the recipe is not known here.
        at: The row's conditions.
        variant: What tells it from the other lines of its row; empty where there is one.
        runs: By seed.
        metrics: What was measured, by the metric's name.
        diverged: How many runs' losses stopped being finite.
        failed: Why it cannot be trained.
        added: Why the row is here although the paper has none.
        shrunk: Setting, and under it the paper's value and that of these runs.
    """

    label: str
    method: str
    at: Mapping[str, Any]
    variant: str
    runs: Mapping[int, ReproduceRecord]
    metrics: Mapping[str, Measured]
    diverged: int
    failed: str | None
    added: str | None
    shrunk: Mapping[str, tuple[Any, Any]]

    @property
    def name(self) -> str:
        """Label and variant."""
        return f"{self.label} ({self.variant})" if self.variant else self.label

    @property
    def settings(self) -> dict[str, Any]:
        """Everything about the runs but their seeds, by dotted name."""
        return plain(next(iter(self.runs.values())).run.settings)


@dataclass(frozen=True)
class Table:
    """A recipe at one budget.

    Attributes:
        id: Of the recipe.
        budget: How much of the paper's set-up was run.
        experiment: The recipe with its paper's defaults; None where it is not known here.
        metrics: What was measured, by name.
        lines: Rows with runs, in the recipe's order.
        not_run: Rows that nobody runs, by label, and why.
        missing: Labels of the rows that have no run yet.
        outdated: How many runs were made under another version of the recipe's file.
    """

    id: str
    budget: Budget
    experiment: Experiment | None
    metrics: Mapping[str, Metric]
    lines: tuple[Line, ...]
    not_run: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    outdated: int = 0

    @property
    def name(self) -> str:
        """A word for files and anchors."""
        return slug(f"{self.id}-{self.budget}")

    @property
    def recipe(self) -> ReproduceRecipe | None:
        """The recipe without its paper's defaults."""
        return self.experiment.recipe if self.experiment else None

    @property
    def comparable(self) -> bool:
        """Whether the paper's numbers may stand beside these."""
        return self.budget == "full"

    @property
    def records(self) -> list[ReproduceRecord]:
        """All runs."""
        return [record for line in self.lines for record in line.runs.values()]


def tables(
    records: Sequence[ReproduceRecord], experiment_of: Callable[[str], Experiment | None]
) -> list[Table]:
    """Return a table for each recipe and budget, the paper's set-up first.

    Args:
        records: Finished runs.
        experiment_of: The recipe of an id; None if it is not known.
    """
    groups: dict[tuple[str, Budget], list[ReproduceRecord]] = {}
    for record in records:
        groups.setdefault((record.recipe, record.budget), []).append(record)
    ordered = sorted(groups, key=lambda key: (key[0], BUDGETS.index(key[1])))
    return [_table(*key, groups[key], experiment_of(key[0])) for key in ordered]


def _table(
    id: str,
    budget: Budget,
    records: Sequence[ReproduceRecord],
    experiment: Experiment | None,
) -> Table:
    by_row: dict[str, list[ReproduceRecord]] = {}
    for record in records:
        by_row.setdefault(record.row, []).append(record)
    if experiment is None:
        metrics = _guessed(records)
        found = [_lines(label, None, metrics, group) for label, group in by_row.items()]
        return Table(id, budget, None, metrics, tuple(line for lines in found for line in lines))
    recipe = experiment.recipe
    rows = {row.label: row for row in recipe.rows}
    # Rows that the recipe no longer has come last.
    order = [
        *(label for label in rows if label in by_row),
        *(each for each in by_row if each not in rows),
    ]
    found = [_lines(label, rows.get(label), recipe.metrics, by_row[label]) for label in order]
    waiting = [row for row in recipe.rows if row.label not in by_row]
    return Table(
        id,
        budget,
        experiment,
        recipe.metrics,
        tuple(line for lines in found for line in lines),
        not_run={row.label: row.not_run for row in waiting if row.not_run},
        missing=tuple(row.label for row in waiting if not row.not_run),
        outdated=sum(record.recipe_sha256 != experiment.sha256 for record in records),
    )


def _guessed(records: Sequence[ReproduceRecord]) -> dict[str, Metric]:
    """Return what runs measured where no recipe says what the paper calls it: errors are shares."""
    names = dict.fromkeys(name for record in records for name in record.run.metrics)
    return {
        name: Metric(
            title=name,
            measured=name,
            form="percent" if "error" in name else "plain",
            unit="percent" if "error" in name else "as measured",
            better="lower",
        )
        for name in names
    }


def _lines(
    label: str, row: Row | None, metrics: Mapping[str, Metric], records: Sequence[ReproduceRecord]
) -> list[Line]:
    """Return a row's lines: runs are put together only if they differ in the seed alone."""
    groups: dict[str, list[ReproduceRecord]] = {}
    for record in records:
        groups.setdefault(repr(plain(record.run.settings)), []).append(record)
    settings = [plain(group[0].run.settings) for group in groups.values()]
    differing = unequal(settings)
    return [
        _line(
            label,
            row,
            metrics,
            {record.run.settings.seed: record for record in group},
            ", ".join(f"{name} {values.get(name)}" for name in differing),
        )
        for values, group in zip(settings, groups.values(), strict=True)
    ]


def _line(
    label: str,
    row: Row | None,
    metrics: Mapping[str, Metric],
    runs: dict[int, ReproduceRecord],
    variant: str,
) -> Line:
    runs = dict(sorted(runs.items()))
    statuses = [record.run.status for record in runs.values()]
    first = next(iter(runs.values()))
    failed = next((record.run.why for record in runs.values() if record.run.why), None)
    paper = row.paper if row else {}
    comparable = first.budget == "full" and not first.shrunk
    return Line(
        label=label,
        method=row.method if row else label,
        at=row.at if row else {},
        variant=variant,
        runs=runs,
        metrics={
            name: _measured(metric, runs, paper.get(name), comparable=comparable)
            for name, metric in metrics.items()
        },
        diverged=statuses.count("diverged"),
        failed=failed,
        added=row.added if row else None,
        shrunk=first.shrunk,
    )


def _measured(
    metric: Metric,
    runs: Mapping[int, ReproduceRecord],
    paper: PaperValue | None,
    *,
    comparable: bool,
) -> Measured:
    values = {seed: metric.of(record.run) for seed, record in runs.items()}
    by_seed = {seed: value for seed, value in values.items() if value is not None}
    # One run has no spread, not one of 0.
    if len(by_seed) < (2 if metric.statistic == "iqr" else 1):
        return Measured({}, None, None, None, paper, None)
    best = [metric.printed(record.run.best.get(metric.measured)) for record in runs.values()]
    had = [value for value in best if value is not None]
    numbers = list(by_seed.values())
    difference = None
    if comparable and paper is not None and paper.value is not None:
        difference = from_value(numbers, paper.value, metric.statistic)
    return Measured(
        by_seed,
        quartiles(numbers),
        statistic(numbers, metric.statistic),
        quartiles(had).median if had else None,
        paper,
        difference,
    )
