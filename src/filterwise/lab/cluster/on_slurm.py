"""Runs as jobs of SLURM, through submitit."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterwise.lab.cluster.handing import Work, check_shared, whole
from filterwise.lab.errors import LabError, UsageError, reason
from filterwise.lab.reproduce.jobs import Done

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from filterwise.lab.reproduce.jobs import Job

__all__ = ["OnSlurm"]

MINUTES = 24 * 60
ELSEWHERE = {"array": "--workers", "output": "the folder", "error": "the folder"}


@dataclass(frozen=True)
class OnSlurm:
    """Executor of SLURM: the runs are one array of jobs.

    A job whose time is over, or whose machine is taken away, is queued again by submitit and
    carries on from its last checkpoint.

    Attributes:
        logs: Folder of the scripts and logs.
        threads: Processor cores for each run.
        gpus: GPUs for each run.
        workers: Runs at a time at most; None: as many as SLURM begins.
        minutes: Of a job, before it is queued again.
        options: Other options of sbatch, by their long names.
        requeues: How often a job whose time is over is queued again.
        seconds: From one look at the jobs to the next.
        cluster: ``slurm``; submitit's ``local`` runs the same here, without SLURM.
    """

    logs: Path
    threads: int = 1
    gpus: int = 0
    workers: int | None = None
    minutes: int = MINUTES
    options: Mapping[str, str] = field(default_factory=dict)
    requeues: int = 20
    seconds: float = 10.0
    cluster: str = "slurm"

    @classmethod
    def of(
        cls,
        options: Mapping[str, str],
        *,
        folder: Path,
        threads: int,
        gpus: int,
        workers: int | None,
    ) -> OnSlurm:
        """Return the executor that options mean.

        Raises:
            UsageError: If one of them is said elsewhere, or the time cannot be read.
        """
        more = dict(options)
        for name, where in ELSEWHERE.items():
            if name in more:
                raise UsageError(f"--cluster-option: {name} is not given here: {where} says it.")
        time_given, cores_given = more.pop("time", None), more.pop("cpus-per-task", None)
        if cores_given is not None:
            threads = whole("cpus-per-task", cores_given)
        minutes = MINUTES if time_given is None else _minutes(time_given)
        return cls(folder.resolve() / "slurm", threads, gpus, workers, minutes, more)

    def __call__(self, jobs: Sequence[Job], finished: Callable[[Job, Done], None]) -> None:
        """Queue all jobs, and wait for them.

        Raises:
            LabError: If SLURM is not here or refuses the jobs, or the folder is not shared.
        """
        executor = self.executor()
        try:
            with executor.batch():
                queued = [executor.submit(Work(job, self.threads)) for job in jobs]
        except Exception as error:
            raise LabError(f"SLURM refuses the jobs: {reason(error)[:500]}.") from None
        running = dict(zip(queued, jobs, strict=True))
        try:
            while running:
                for each in [each for each in running if each.done()]:
                    job = running.pop(each)
                    done = self._result(each)
                    check_shared(job, done)
                    finished(job, done)
                if running:
                    time.sleep(self.seconds)
        finally:
            for each in running:
                each.cancel(check=False)

    def executor(self) -> Any:
        """Return submitit's executor with everything that the jobs ask for.

        Raises:
            LabError: If SLURM is not here.
        """
        import submitit

        try:
            executor = submitit.AutoExecutor(
                self.logs, cluster=self.cluster, slurm_max_num_timeout=self.requeues
            )
        except RuntimeError:
            raise LabError(
                "SLURM is not on this machine: there is no sbatch or srun. Give this command on a"
                " login node of the cluster."
            ) from None
        # An option without a value, such as exclusive, is a flag.
        more = {name: value or True for name, value in self.options.items()}
        executor.update_parameters(
            name="filterwise",
            timeout_min=self.minutes,
            cpus_per_task=self.threads,
            nodes=1,
            tasks_per_node=1,
            slurm_array_parallelism=self.workers or 256,
            slurm_additional_parameters=more,
            **({"gpus_per_node": self.gpus} if self.gpus else {}),
        )
        return executor

    def _result(self, queued: Any) -> Done:
        try:
            return queued.result()
        except Exception as error:
            # The last line of what submitit passes on names what happened in the job.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Done(None, f"its job {queued.job_id} failed: {lines[-1][:300]} ({self.logs})")


def _minutes(text: str) -> int:
    """Return the minutes of a time as sbatch takes it: minutes, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise UsageError(
            f"--cluster-option: time={text} will not do: minutes, hours:minutes:seconds or"
            " days-hours:minutes:seconds."
        )
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1]:
        minutes = 60 * (24 * days + first) + second + (third > 0)
    elif found[4]:
        minutes = 60 * first + second + (third > 0)
    else:
        minutes = first + (second > 0)
    if minutes < 1:
        raise UsageError(f"--cluster-option: time={text} leaves a job no time.")
    return minutes
