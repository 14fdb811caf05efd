"""``filterwise reproduce``: what is asked for, what is run, and what a person sees of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.preflight import check_device
from filterwise.lab.reproduce.estimate import readable, seconds_of, side_by_side
from filterwise.lab.reproduce.index import find, listed
from filterwise.lab.reproduce.jobs import Local, run_all
from filterwise.lab.reproduce.plan import make_plan
from filterwise.lab.reproduce.readiness import refusals
from filterwise.lab.reproduce.records import ReproduceResults

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from filterwise.lab.reproduce.experiments import Experiment
    from filterwise.lab.reproduce.jobs import Done, Executor, Job
    from filterwise.lab.reproduce.plan import Asked, Plan
    from filterwise.lab.reproduce.records import ReproduceRecord
    from filterwise.lab.terminal import Terminal

__all__ = ["Reproduction", "reproduce", "show_list", "show_plan", "show_results"]


@dataclass
class Reproduction:
    """One command: what it was to do, and what came of it.

    Attributes:
        experiment: The recipe.
        asked: What was asked for.
        plan: The runs.
        refused: Why jobs cannot be run, by key.
        failed: Why jobs that were begun came to nothing, by key.
        records: The lines of the plan's jobs.
        workers: Runs at a time.
    """

    experiment: Experiment
    asked: Asked
    plan: Plan
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    records: dict[str, ReproduceRecord] = field(default_factory=dict)
    workers: int = 1

    @property
    def label(self) -> str:
        """What every table of it is headed by."""
        label = f"{self.experiment.recipe.id}, budget {self.asked.budget}"
        return label if self.asked.budget == "full" else f"{label} (shrunk)"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: what ``--json`` prints."""
        reasons = {**self.refused, **self.failed}
        return {
            "recipe": self.experiment.recipe.id,
            "budget": self.asked.budget,
            "folder": str(self.asked.folder),
            "not_run": self.plan.not_run,
            "runs": [
                {
                    "recipe": job.facts.recipe,
                    "row": job.facts.row,
                    "seed": job.settings.seed,
                    "id": job.settings.identity,
                    "shrunk": job.facts.shrunk,
                    "seconds_expected": _expected(job),
                    "refused": reasons.get(job.key),
                    "metrics": record.run.metrics if record else None,
                    "status": record.run.status if record else None,
                }
                for job in self.plan.all
                for record in (self.records.get(job.key),)
            ],
        }


def show_list(terminal: Terminal, as_json: bool = False) -> None:
    """Write every table and figure of the papers."""
    entries = listed()
    if as_json:
        terminal.raw(json.dumps([asdict(each) for each in entries], indent=2))
        return
    rows = []
    for each in entries:
        more = f" [{each.without}]" if each.without else ""
        rows.append((each.id, each.where, str(each.rows or "-"), each.title + more))
    terminal.table("Tables and figures", ("id", "where", "rows", "what"), rows, right={"rows"})


def prepare(
    name: str,
    asked: Asked,
    *,
    workers: int | None,
    look_at_data: bool,
    elsewhere: bool = False,
) -> Reproduction:
    """Find out what is to be run and what cannot be.

    Args:
        name: Id or file of the recipe.
        asked: What is asked for.
        workers: Runs at a time; None: as many as this machine has room for.
        look_at_data: Whether to look for the data sets.
        elsewhere: Whether other machines do the runs, so that this one needs neither the device
            nor room.

    Raises:
        UsageError: If there is no such recipe, row or device, or a recipe says what it may not.
    """
    if not elsewhere:
        check_device(asked.execution.device)
    experiment = find(name, asked.root)
    plan = make_plan(experiment, asked)
    found = Reproduction(experiment, asked, plan)
    found.records = _lines(asked.folder, plan.all)
    missing = [job for job in plan.all if job.key not in found.records]
    found.refused = refusals(missing, look_at_data=look_at_data)
    ready = [job.settings for job in plan.all if job.key not in found.refused]
    found.workers = workers or (1 if elsewhere else side_by_side(ready))
    return found


def reproduce(
    found: Reproduction, terminal: Terminal, executor: Executor | None = None
) -> Reproduction:
    """Run what is missing.

    Args:
        found: From `prepare`.
        terminal: Where progress and remarks go.
        executor: Who does the runs; None: a pool of processes here.

    Raises:
        UsageError: If nothing of it can be run.
        LabError: If the disk refuses or a process is killed; finished runs are kept.
    """
    plan, asked = found.plan, found.asked
    jobs = [
        job for job in plan.all if job.key not in found.refused and job.key not in found.records
    ]
    _announce(found, jobs, terminal)
    if not jobs:
        if not found.records:
            raise UsageError("nothing of this can be run here.")
        return found
    ReproduceResults(asked.folder).prepare()
    if executor is None:
        # As many as torch would take, which OMP_NUM_THREADS may have limited.
        executor = Local(found.workers, max(1, torch.get_num_threads() // found.workers))
    expected = {job.key: _expected(job) or 1.0 for job in jobs}
    with terminal.progress("training", sum(expected.values())) as advance:

        def finished(job: Job, done: Done) -> None:
            advance(expected[job.key])
            if done.record is None:
                found.failed[job.key] = str(done.why)
                terminal.warn(f"{job.label} could not be run: {done.why}")
                return
            terminal.say(f"{job.label}: {_outcome(done.record)}")

        try:
            run_all(jobs, executor, finished)
        except KeyboardInterrupt:
            raise LabError(
                f"Stopped. What finished is kept in {asked.folder}; the same command carries on."
            ) from None
    found.records = _lines(asked.folder, plan.all)
    return found


def _lines(folder: Path, jobs: Sequence[Job]) -> dict[str, ReproduceRecord]:
    there = ReproduceResults(folder).read().records
    return {job.key: there[job.key] for job in jobs if job.key in there}


def _expected(job: Job) -> float | None:
    try:
        return seconds_of(job.settings)
    except LabError:
        return None


def _announce(found: Reproduction, jobs: Sequence[Job], terminal: Terminal) -> None:
    plan = found.plan
    for complaint in ReproduceResults(found.asked.folder).read().complaints:
        terminal.warn(complaint)
    for why, rows in _by_reason(plan.all, found.refused).items():
        terminal.warn(f"refused: {'; '.join(rows)}: {why}")
    total = len(plan.all) - len(found.refused)
    done = total - len(jobs)
    times = [_expected(job) for job in jobs]
    about = ""
    if jobs and all(time is not None for time in times):
        seconds = sum(time or 0.0 for time in times) / found.workers
        about = f", about {readable(seconds)} with {found.workers} at a time (a rough estimate)"
    before = f" ({len(plan.before)} of them for the weights that others start with)"
    terminal.say(
        f"{found.label}: {total} runs{before if plan.before else ''} into {found.asked.folder}, "
        + (f"{done} of them finished already{about}" if done else f"none finished yet{about}")
    )


def _by_reason(jobs: Sequence[Job], reasons: dict[str, str]) -> dict[str, list[str]]:
    """Return the rows that each reason keeps from being run."""
    rows: dict[str, dict[str, None]] = {}
    found: dict[str, dict[str, dict[str, None]]] = {}
    for job in jobs:
        rows.setdefault(job.facts.recipe, {})[job.facts.row] = None
        if job.key in reasons:
            these = found.setdefault(reasons[job.key], {}).setdefault(job.facts.recipe, {})
            these[job.facts.row] = None
    return {
        why: [
            f"{recipe} (all {len(names)} rows)"
            if len(names) == len(rows[recipe]) > 1
            else f"{recipe} {', '.join(repr(name) for name in names)}"
            for recipe, names in recipes.items()
        ]
        for why, recipes in found.items()
    }


def _outcome(record: ReproduceRecord) -> str:
    run = record.run
    seconds = readable(run.times["seconds"])
    if run.status == "failed":
        return f"cannot be trained: {run.why} ({seconds})"
    words = ", ".join(f"{name} {value:.4g}" for name, value in run.metrics.items())
    if run.status == "diverged":
        epoch, step = run.diverged_at or (0, 0)
        return f"diverged in epoch {epoch}, step {step} ({words}; {seconds})"
    return f"{words} ({seconds})"


def show_plan(found: Reproduction, terminal: Terminal) -> None:
    """Write the runs with their estimates, and what is smaller than in the paper."""
    plan = found.plan
    seeds = Counter((job.facts.recipe, job.facts.row) for job in plan.all)
    rows, total = [], 0.0
    for job in plan.all:
        if not seeds.get((job.facts.recipe, job.facts.row)):
            continue
        count = seeds.pop((job.facts.recipe, job.facts.row))
        seconds = _expected(job)
        total += count * (seconds or 0.0)
        settings = job.settings
        optimization = settings.optimization
        rows.append(
            (
                f"{job.facts.recipe} {job.facts.row}" if job in plan.before else job.facts.row,
                f"{settings.model.name} {settings.model.recipe}",
                settings.data.name,
                f"{optimization.epochs} x {settings.data.train_samples or 'all'}",
                f"{optimization.step_size} at {optimization.learning_rate:g}",
                str(count),
                "-" if seconds is None else readable(seconds),
                found.refused.get(job.key, ""),
            )
        )
    headers = ("row", "model", "data", "epochs", "batch at LR", "runs", "each", "refused")
    refused = any(row[-1] for row in rows)
    shown = [row if refused else row[:-1] for row in rows]
    terminal.table(found.label, headers if refused else headers[:-1], shown, right={"runs", "each"})
    for label, why in plan.not_run.items():
        terminal.print(f"not run: {label}: {why}")
    _say_shrunk(found, terminal)
    device = found.asked.execution.device
    terminal.print(
        f"Estimate: {readable(total)} of runs on {device}, {readable(total / found.workers)} with"
        f" {found.workers} at a time. It counts multiply-adds and layers and knows nothing of this"
        " machine."
    )
    if found.asked.budget == "full":
        cost = found.experiment.recipe.cost
        seeds = "one seed" if cost.seeds == 1 else f"{cost.seeds} seeds"
        terminal.print(
            f"The recipe's own estimate for {seeds} of each row: {cost.gpu_hours:g} h on one large"
            f" GPU (bf16, compiled), {cost.cpu_hours:g} h on two CPU cores."
        )


def _say_shrunk(found: Reproduction, terminal: Terminal) -> None:
    changes: dict[str, list[str]] = {}
    for job in found.plan.jobs:
        for name, (before, after) in job.facts.shrunk.items():
            text = f"{before} -> {after}"
            if text not in changes.setdefault(name, []):
                changes[name].append(text)
    for name, texts in changes.items():
        terminal.print(f"shrunk: {name}: {', '.join(texts)}")


def show_results(found: Reproduction, terminal: Terminal) -> None:
    """Write what the rows came to; the paper's numbers beside them at full only."""
    experiment, full = found.experiment, found.asked.budget == "full"
    names = list(experiment.recipe.metrics)
    headers = ["row", *(f"{name} (median)" for name in names), "runs", "diverged"]
    headers += [f"paper: {name}" for name in names] if full else []
    rows = []
    for row in found.plan.rows:
        mine = [
            found.records[job.key].run
            for job in found.plan.jobs
            if job.facts.row == row.label and job.key in found.records
        ]
        cells = [row.label]
        for name in names:
            metric = experiment.recipe.metrics[name]
            values = [value for run in mine if (value := metric.of(run)) is not None]
            plain = metric.statistic == "median" and values
            cells.append(f"{median(values):.4g}" if plain else "-")
        cells += [str(len(mine)), str(sum(run.status == "diverged" for run in mine))]
        if full:
            cells += [_of_paper(row.paper.get(name)) for name in names]
        rows.append(tuple(cells))
    terminal.table(found.label, headers, rows, right=set(headers[1:]))
    if not full:
        _say_shrunk(found, terminal)
        terminal.print(
            "Shrunk runs are not comparable with the paper, whose numbers are not shown."
        )
    for origin in sorted(
        {
            str(each.run.facts["origin"])
            for each in found.records.values()
            if "origin" in each.run.facts
        }
    ):
        terminal.print(f"data: {origin}")


def _of_paper(value: Any) -> str:
    if value is None:
        return ""
    if value.value is None:
        return value.mark or value.status
    return f"{value.value:g}" + ("" if value.status == "printed" else f" ({value.status})")
