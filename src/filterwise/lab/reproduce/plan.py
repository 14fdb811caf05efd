"""From a recipe's rows to jobs, with those whose weights they start with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterwise.lab.errors import UsageError
from filterwise.lab.reproduce.budgets import RULES, shrunk_to
from filterwise.lab.reproduce.experiments import RECIPES, find_experiment
from filterwise.lab.reproduce.jobs import Job
from filterwise.lab.reproduce.records import Budget, LineFacts
from filterwise.lab.training.settings import Execution

if TYPE_CHECKING:
    from collections.abc import Sequence

    from filterwise.lab.reproduce.experiments import Experiment
    from filterwise.lab.reproduce.schema import Row

__all__ = ["Asked", "Plan", "make_plan"]


@dataclass(frozen=True)
class Asked:
    """What one ``filterwise reproduce ID`` is asked to do.

    Attributes:
        rows: Labels or methods; all without one.
        seeds: How many: 0, 1, ...; None for the budget's.
        budget: How much of the set-up.
        folder: Of the results.
        execution: Where and how.
        precision: In place of the recipe's.
        root: Where the recipes lie.
    """

    rows: tuple[str, ...] = ()
    seeds: int | None = None
    budget: Budget = "full"
    folder: Path = Path("runs/reproduce")
    execution: Execution = field(default_factory=Execution)
    precision: str | None = None
    root: Path = RECIPES


@dataclass
class Plan:
    """What is to be run.

    Attributes:
        jobs: Seed by seed, so that what is finished first has all rows in it.
        before: Jobs of other recipes, whose weights some of them start with.
        rows: The rows asked for.
        not_run: Rows that the paper has not run either, and why.
    """

    jobs: list[Job] = field(default_factory=list)
    before: list[Job] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> list[Job]:
        """All jobs, in the order to do them."""
        return [*self.before, *self.jobs]


def make_plan(experiment: Experiment, asked: Asked) -> Plan:
    """Return the runs of a recipe's rows.

    Raises:
        UsageError: If there is no such row, or a setting cannot be.
    """
    rule = RULES[asked.budget]
    seeds = asked.seeds or min(experiment.seeds, rule.seeds if rule else experiment.seeds)
    plan = Plan(rows=experiment.rows(asked.rows))
    before: dict[str, Job] = {}
    for seed in range(seeds):
        for row in plan.rows:
            if row.not_run:
                plan.not_run[row.label] = row.not_run
                continue
            chain = _chain(experiment, row, seed, asked, ())
            plan.jobs.append(chain[-1])
            before |= {job.key: job for job in chain[:-1]}
    mine = {job.key for job in plan.jobs}
    plan.before = [job for key, job in before.items() if key not in mine]
    return plan


def _chain(
    experiment: Experiment, row: Row, seed: int, asked: Asked, on_the_way: Sequence[str]
) -> list[Job]:
    """Return the job of a row and, before it, those that it starts with."""
    name = f"{experiment.recipe.id} {row.label}"
    if name in on_the_way:
        raise UsageError(f"{name} starts with itself, by way of {', '.join(on_the_way)}.")
    settings, shrunk = shrunk_to(experiment.settings(row), asked.budget)
    changes: dict[str, Any] = {"seed": seed, "execution": asked.execution}
    if asked.precision:
        changes["precision"] = asked.precision
    chain: list[Job] = []
    if row.start:
        source = experiment
        if row.start.recipe != experiment.recipe.id:
            source = find_experiment(row.start.recipe, asked.root)
        chain = _chain(source, source.row(row.start.row), seed, asked, (*on_the_way, name))
        start = {"start": chain[-1].settings.identity}
        changes["model"] = settings.model.model_copy(update=start)
        runs = str((asked.folder / "runs").absolute())
        changes["execution"] = asked.execution.model_copy(update={"runs": runs})
    settings = type(settings).model_validate(settings.model_copy(update=changes).model_dump())
    facts = LineFacts(
        recipe=experiment.recipe.id,
        recipe_sha256=experiment.sha256,
        row=row.label,
        budget=asked.budget,
        shrunk=shrunk,
    )
    needs = chain[-1].settings.identity if chain else None
    return [*chain, Job(settings, asked.folder, facts, needs)]
