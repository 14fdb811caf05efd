"""What a worker on another machine is given, and what must hold when it is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.reproduce.jobs import Done, do, finished_lines_left_out

if TYPE_CHECKING:
    from filterwise.lab.reproduce.jobs import Job

__all__ = ["Work", "check_shared", "portable", "whole"]


def portable(job: Job) -> Job:
    """Return a job whose paths do not depend on the directory it is begun in."""
    execution = job.settings.execution
    here = execution.model_copy(update={"root": str(Path(execution.root).resolve())})
    settings = job.settings.model_copy(update={"execution": here})
    return replace(job, folder=job.folder.resolve(), settings=settings)


class Work:
    """A job as a cluster calls it, again and again if need be: it goes on from its checkpoint."""

    def __init__(self, job: Job, threads: int) -> None:
        """Take the job, and the processor cores that it may use."""
        self.job, self.threads = portable(job), threads

    def __call__(self) -> Done:
        """Do the job."""
        torch.set_num_threads(self.threads)
        done = do(self.job)
        return done or Done(None, "it was stopped")

    def checkpoint(self) -> object:
        """Return what SLURM is to queue when it takes the machine away: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_shared(job: Job, done: Done) -> None:
    """See that the line that a worker wrote can be read here.

    Raises:
        LabError: If it cannot, as on a file system that the machines do not share.
    """
    if done.record is not None and finished_lines_left_out([job]):
        raise LabError(
            f"{job.label} is finished, but its line is not in {job.folder.resolve()}: the machines"
            " do not share this folder. Name one that all of them reach under the same path."
        )


def whole(name: str, text: str) -> int:
    """Return the whole number, from 1, that an option's value means.

    Raises:
        UsageError: If it means none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--cluster-option: {name}={text} will not do: it takes a whole number.")
    return int(text)
