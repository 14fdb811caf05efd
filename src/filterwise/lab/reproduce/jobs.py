"""Jobs: one run of one row each, and who does them."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import filterwise as fw
from filterwise.lab.errors import LabError, reason
from filterwise.lab.processes import work_through
from filterwise.lab.reproduce.records import (
    LineFacts,
    ReproduceRecord,
    ReproduceResults,
    line_key,
)
from filterwise.lab.training.loop import Stopped
from filterwise.lab.training.settings import TrainingSettings
from filterwise.lab.training.train import train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Done", "Executor", "Job", "Local", "do", "run_all"]


@dataclass(frozen=True)
class Job:
    """One run of one row; plain data, that any process or machine can be handed.

    Attributes:
        settings: Of the run.
        folder: Of the results; the run's own folder lies in its ``runs``, by identity.
        facts: What the line says besides the run.
        needs: Identity of the run whose weights it starts with.
    """

    settings: TrainingSettings
    folder: Path
    facts: LineFacts
    needs: str | None = None

    @property
    def key(self) -> str:
        """What its line is known by."""
        return line_key(self.facts, self.settings.identity)

    @property
    def home(self) -> Path:
        """The run's own folder."""
        return self.folder / "runs" / self.settings.identity

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.facts.recipe}: {self.facts.row}, seed {self.settings.seed}"


@dataclass(frozen=True)
class Done:
    """What came of a job.

    Attributes:
        record: Its line; None if it could not be run.
        why: Why not.
    """

    record: ReproduceRecord | None
    why: str | None = None


class Executor(Protocol):
    """Does jobs that do not depend on each other, in any order and anywhere."""

    def __call__(self, jobs: Sequence[Job], finished: Callable[[Job, Done], None]) -> None:
        """Do all jobs, each by `do`, and call `finished` for each here, in the calling process."""
        ...


def run_all(
    jobs: Sequence[Job],
    executor: Executor,
    finished: Callable[[Job, Done], None] = lambda _job, _done: None,
) -> None:
    """Do jobs, those first whose weights others start with.

    A line that is in the results already is not made again, and a job that cannot be run does not
    keep others from it.

    Args:
        jobs: In the order to begin them; what a job needs is among them or done.
        executor: Who does them.
        finished: Called for each job that is done, or could not be.

    Raises:
        LabError: If the disk refuses or an executor fails; finished runs are kept.
    """
    waiting = finished_lines_left_out(jobs)
    while waiting:
        pending = {job.settings.identity for job in waiting}
        ready = [job for job in waiting if job.needs not in pending]
        if not ready:
            raise LabError(f"{waiting[0].label} starts with a run that starts with it.")
        executor(ready, finished)
        waiting = [job for job in waiting if job.needs in pending]


def finished_lines_left_out(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs whose lines are not in the results."""
    lines = {folder: ReproduceResults(folder).read().records for folder in {j.folder for j in jobs}}
    return [job for job in jobs if job.key not in lines[job.folder]]


def do(job: Job, wait: bool = True, stopped: Callable[[], bool] = lambda: False) -> Done | None:
    """Do a job here: train, or read what a finished run left, and add its line.

    Args:
        job: What to do.
        wait: Whether to wait while another command is training this run.
        stopped: Asked before each step; a checkpoint is written before stopping.

    Returns:
        What came of it; None if it was not waited for, or stopped.
    """
    results = ReproduceResults(job.folder)
    try:
        results.prepare()
        while not stopped():
            with results.claim(job.settings.identity) as mine:
                if mine:
                    return Done(_line(job, results, stopped))
            if not wait:
                return None
            time.sleep(0.2)
    except Stopped:
        pass
    except LabError as error:
        return Done(None, str(error))
    except (RuntimeError, ValueError, OSError) as error:
        # What a library says of this run alone, out of memory first of all.
        return Done(None, f"{type(error).__name__}: {reason(error)[:300]}")
    return None


def _line(job: Job, results: ReproduceResults, stopped: Callable[[], bool]) -> ReproduceRecord:
    found = results.read().records.get(job.key)
    if found is not None:
        return found
    with warnings.catch_warnings():
        # The record says what was converted and what was not.
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        run = train(job.settings, job.home, asked_to_stop=stopped)
    record = ReproduceRecord(**dict(job.facts), run=run)
    results.add(record)
    return record


@dataclass(frozen=True)
class Local:
    """Executor of this machine: a pool of processes.

    Attributes:
        processes: Runs at a time.
        threads: Of each.
    """

    processes: int = 1
    threads: int = 1

    def __call__(self, jobs: Sequence[Job], finished: Callable[[Job, Done], None]) -> None:
        """Do all jobs."""
        work_through(
            jobs,
            _do_in_process,
            start=_start_process,
            processes=self.processes,
            threads=self.threads,
            option="--workers",
            finished=finished,
        )


_process: dict[str, Any] = {}
"""What a process keeps between jobs."""


def _start_process(stop: Any) -> None:
    _process["stop"] = stop


def _do_in_process(job: Job, wait: bool) -> Done | None:
    return do(job, wait, _process["stop"].is_set)
