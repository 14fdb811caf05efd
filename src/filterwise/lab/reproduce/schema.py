"""What a recipe file may say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from filterwise.lab.checking import nearest
from filterwise.lab.settings import Frozen
from filterwise.lab.tasks import TASKS

if TYPE_CHECKING:
    from filterwise.lab.training.record import TrainingRecord

__all__ = [
    "Choice",
    "Cost",
    "Mean",
    "Metric",
    "PaperDefaults",
    "PaperValue",
    "ReproduceRecipe",
    "Row",
    "Start",
]

Text = Annotated[str, Field(min_length=1)]
Seeds = Annotated[int, Field(ge=1, le=1000)]
Hours = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Condition = str | bool | int | float


class PaperValue(Frozen):
    """One number of a paper.

    Attributes:
        value: The number, in the metric's unit; None where none can be had.
        status: ``printed``: read from the document; ``recovered``: lost in the table, known from
            elsewhere; ``unreadable``: not legible, or only drawn.
        mark: What is printed in place of a number: a dash, NaN, words.
        how: Where a recovered number comes from, or why it cannot be read.
    """

    value: float | None
    status: Literal["printed", "recovered", "unreadable"]
    mark: str | None = None
    how: str | None = None

    @model_validator(mode="after")
    def _says_what_it_is(self) -> PaperValue:
        if self.status == "recovered" and not self.how:
            raise ValueError("a recovered number says how")
        if self.status == "unreadable" and self.value is not None:
            raise ValueError("an unreadable number has no value")
        if self.status == "printed" and (self.value is None) == (self.mark is None):
            raise ValueError("what is printed is a value or a mark")
        return self


class Metric(Frozen):
    """What a number of the paper is, and how it is made from what a run measured.

    Attributes:
        title: As the paper calls it.
        measured: Name in a run's metrics.
        form: ``percent``: a share times 100; ``complement``: 100 times one minus the share, an
            accuracy out of an error; ``plain``: as it is measured.
        unit: Of the printed number.
        better: Which direction is better.
        statistic: Over the seeds: ``median``, or ``iqr``, the distance of the quartiles.
        level: With one the number is the first epoch after which the value, in percent or plain,
            has risen to it.
    """

    title: Text
    measured: Text
    form: Literal["percent", "complement", "plain"] = "percent"
    unit: Text = "percent"
    better: Literal["lower", "higher"]
    statistic: Literal["median", "iqr"] = "median"
    level: float | None = None

    def of(self, record: TrainingRecord) -> float | None:
        """Return a run's number in the paper's unit; None where the run has none."""
        if self.level is None:
            return self.printed(record.metrics.get(self.measured))
        for point in record.curve:
            value = self.printed(point.get(self.measured))
            if value is not None and value >= self.level:
                return point["epoch"]
        return None

    def printed(self, value: float | None) -> float | None:
        """Return a measured value in the paper's unit."""
        if value is None or self.form == "plain":
            return value
        return 100 * value if self.form == "percent" else 100 * (1 - value)


class Choice(Frozen):
    """A place where the paper is silent.

    Attributes:
        what: Which.
        choose: What is done here.
        why: Why that.
    """

    what: Text
    choose: Text
    why: Text


class Start(Frozen):
    """Another run whose weights a run begins with: of the same seed and budget.

    Attributes:
        recipe: Id of its recipe.
        row: Label of its row.
    """

    recipe: Text
    row: Text


class Row(Frozen):
    """One set-up: a run for each seed.

    Attributes:
        label: Unique in the recipe.
        method: As the paper calls it.
        at: The conditions of the row, such as ``batch: 64``: what a table pivots on.
        run: Settings of `filterwise.lab.training.settings.TrainingSettings` over the recipe's.
        start: Whose weights it begins with.
        not_run: Why there is nothing to run: the paper has no such run either.
        added: Why the row is here although the paper has no such row.
        paper: The paper's numbers, by metric.
    """

    label: Text
    method: Text
    at: dict[str, Condition] = Field(default_factory=dict)
    run: dict[str, Any] = Field(default_factory=dict)
    start: Start | None = None
    not_run: str | None = None
    added: str | None = None
    paper: dict[str, PaperValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_reason(self) -> Row:
        if not self.paper and not self.added:
            raise ValueError("a row has numbers of the paper, or says why it was added")
        if self.not_run and (self.run or self.start):
            raise ValueError("a row that is not run has no settings")
        return self


class Mean(Frozen):
    """A number that the paper makes out of several rows: the mean of all their values.

    Attributes:
        label: Of the number.
        rows: Labels of the rows.
        paper: The paper's mean.
    """

    label: Text
    rows: Annotated[tuple[str, ...], Field(min_length=1)]
    paper: PaperValue


class Cost(Frozen):
    """Rough hours of the whole of a recipe at ``full``, as estimated when it was written.

    Attributes:
        gpu_hours: On one large GPU (bf16, compiled).
        cpu_hours: On two CPU cores.
        seeds: Of each row, in these hours.
    """

    gpu_hours: Hours
    cpu_hours: Hours
    seeds: Seeds = 1


class PaperDefaults(Frozen):
    """What holds for all recipes of a paper: ``defaults.yaml`` beside them.

    Attributes:
        paper: Name of the folder.
        title: Of the paper.
        authors: Of the paper.
        code: Of the same authors, where there is some.
        constants: What the paper says of all its runs, in words.
        run: Settings that every recipe begins with.
        seeds: How many at ``full``.
        silent: Places where the paper is silent, for several recipes.
        notes: Contradictions and doubts.
    """

    paper: Text
    title: Text
    authors: Text
    code: Text
    constants: dict[str, str] = Field(default_factory=dict)
    run: dict[str, Any] = Field(default_factory=dict)
    seeds: Seeds = 3
    silent: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()


class ReproduceRecipe(Frozen):
    """One table or figure.

    Attributes:
        id: Folder and name of its file.
        where: Section and table or figure.
        title: What it shows, in one line.
        task: A name of `filterwise.lab.tasks.TASKS`.
        constants: What the paper says of these runs, in words.
        draws: Of a figure: what is on its axes, and what a line is.
        metrics: What its numbers are, by name.
        run: Settings that every row begins with, over the paper's defaults.
        seeds: How many at ``full``, in place of the paper's.
        rows: In the paper's order.
        means: Numbers made out of several rows.
        silent: Places where the paper is silent, besides those of the defaults.
        notes: Contradictions and doubts.
        cost: What the whole of it costs.
    """

    id: Annotated[str, Field(pattern=r"^[a-z0-9_-]+/[a-z0-9_-]+$")]
    where: Text
    title: Text
    task: str = "classification"
    constants: dict[str, str] = Field(default_factory=dict)
    draws: str | None = None
    metrics: Annotated[dict[str, Metric], Field(min_length=1)]
    run: dict[str, Any] = Field(default_factory=dict)
    seeds: Seeds | None = None
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    means: tuple[Mean, ...] = ()
    silent: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()
    cost: Cost

    @field_validator("task")
    @classmethod
    def _is_known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"there is no such task. {nearest(task, list(TASKS), 'Tasks')}")
        return task

    @model_validator(mode="after")
    def _hangs_together(self) -> ReproduceRecipe:
        labels = [row.label for row in self.rows]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two rows have the label {label!r}")
        for row in self.rows:
            for name in row.paper:
                if name not in self.metrics:
                    hint = nearest(name, list(self.metrics), "Metrics")
                    raise ValueError(f"row {row.label!r}: there is no metric {name!r}. {hint}")
        for mean in self.means:
            for label in mean.rows:
                if label not in labels:
                    raise ValueError(f"mean {mean.label!r}: there is no row {label!r}")
        return self
