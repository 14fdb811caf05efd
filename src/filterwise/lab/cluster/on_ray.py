"""Runs on a Ray cluster, or on a Ray of this machine."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filterwise.lab.cluster.handing import Work, check_shared, whole
from filterwise.lab.errors import LabError, UsageError, reason
from filterwise.lab.reproduce.jobs import Done

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from filterwise.lab.reproduce.jobs import Job

__all__ = ["OnRay"]

MEMORY = 200 * 2**20
"""Bytes of the store of a Ray that is started here; jobs and records are small."""


@dataclass(frozen=True)
class OnRay:
    """Executor of Ray: each run is a task.

    A task whose worker dies, or whose machine goes, is begun again elsewhere and carries on from
    its last checkpoint.

    Attributes:
        threads: Processor cores for each run.
        gpus: GPUs for each run; half of one lets two runs share it.
        workers: Runs at a time at most; None: as many as the cluster takes.
        address: Of the cluster; None: what ``RAY_ADDRESS`` names, else a Ray of this machine.
        retries: How often a run is begun again whose worker died.
    """

    threads: int = 1
    gpus: float = 0.0
    workers: int | None = None
    address: str | None = None
    retries: int = 3

    @classmethod
    def of(
        cls, options: Mapping[str, str], *, threads: int, gpus: float, workers: int | None
    ) -> OnRay:
        """Return the executor that options mean.

        Raises:
            UsageError: If one of them is unknown, or not a number where it has to be.
        """
        known = ("address", "cpus", "gpus", "retries")
        unknown = [name for name in options if name not in known]
        if unknown:
            raise UsageError(
                f"--cluster-option: Ray has no option {unknown[0]!r} here. Options:"
                f" {', '.join(known)}."
            )
        if "gpus" in options:
            gpus = _share(options["gpus"])
        return cls(
            threads=whole("cpus", options["cpus"]) if "cpus" in options else threads,
            gpus=gpus,
            workers=workers,
            address=options.get("address"),
            retries=whole("retries", options.get("retries", str(cls.retries))),
        )

    def __call__(self, jobs: Sequence[Job], finished: Callable[[Job, Done], None]) -> None:
        """Do all jobs.

        Raises:
            LabError: If the cluster cannot be reached, or does not share the folder.
        """
        import ray

        with self._ray() as ray_was_there:
            self._check_resources(ray)
            task = ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=self.retries)(
                _work
            )
            waiting = list(reversed(jobs))
            running: dict[Any, Job] = {}
            at_once = self.workers or len(jobs)
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        job = waiting.pop()
                        running[task.remote(Work(job, self.threads))] = job
                    for ready in ray.wait(list(running), num_returns=1)[0]:
                        job = running.pop(ready)
                        done = self._result(ray, ready)
                        check_shared(job, done)
                        finished(job, done)
            finally:
                if ray_was_there:
                    # Of somebody else's cluster nothing is left busy with what nobody waits for.
                    for each in running:
                        ray.cancel(each, force=True)

    @contextmanager
    def _ray(self) -> Iterator[bool]:
        """Be connected; a Ray that is started here ends here. Yields whether it was there."""
        import ray

        if ray.is_initialized():
            yield True
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self.address or os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {} if address else {"object_store_memory": MEMORY}
        if self.workers and not address:
            own["num_cpus"] = self.workers * self.threads
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"Ray at {address}" if address else "Ray on this machine"
            raise LabError(f"{where} cannot be reached: {reason(error)[:300]}.") from None
        try:
            yield address is not None
        finally:
            ray.shutdown()

    def _check_resources(self, ray: Any) -> None:
        """Refuse what no cluster of this size will ever begin."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = {name: max(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        if most["CPU"] < self.threads or most["GPU"] < self.gpus:
            raise UsageError(
                f"a run asks for {self.threads} cores and {self.gpus:g} GPUs, and no machine of"
                f" this Ray has more than {most['CPU']:g} and {most['GPU']:g}."
            )

    def _result(self, ray: Any, ready: Any) -> Done:
        try:
            return ray.get(ready)
        except ray.exceptions.RayError as error:
            return Done(
                None,
                f"its worker died {self.retries + 1} times (out of memory?):"
                f" {type(error).__name__}. Its checkpoint is kept.",
            )


def _work(work: Work) -> Done:
    return work()


def _share(text: str) -> float:
    """Return the GPUs of a run: a share of one, or a whole number, as Ray gives them out."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < 1 and not (found >= 1 and found.is_integer()):
        raise UsageError(
            f"--cluster-option: gpus={text} will not do: a share of one, such as 0.5, or a whole"
            " number."
        )
    return found
