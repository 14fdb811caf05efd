"""A run from settings to a record, resumed where it was killed."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed

from filterwise.lab.hardware import commit, hardware, peak_memory, versions
from filterwise.lab.tasks import make_task
from filterwise.lab.training.checkpoint import RunFolder
from filterwise.lab.training.logs import Logs, open_logs
from filterwise.lab.training.loop import Plan, Position, Stopped, run
from filterwise.lab.training.optimizers import make_optimizer
from filterwise.lab.training.place import be_deterministic, make_fabric
from filterwise.lab.training.record import TrainingRecord
from filterwise.lab.training.seeds import seed_everything
from filterwise.lab.training.stepper import Stepper

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_fabric import Fabric

    from filterwise.lab.tasks.task import Task
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["train"]

ONE_VALUE = ("Expected more than 1 value per channel", "Expected more than 1 spatial element")


def train(
    settings: TrainingSettings,
    folder: Path | str | None = None,
    *,
    asked_to_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[float], None] = lambda _share: None,
) -> TrainingRecord:
    """Train one model and measure it.

    With a folder the run is kept there (`RunFolder`): killed at any moment, the same call goes on
    from its last checkpoint and comes to the same result, on a CPU to the bit; a finished one is
    only read. Started by ``torchrun``, the processes share each step's samples.

    Args:
        settings: What to train.
        folder: The run's own folder; None keeps nothing.
        asked_to_stop: Looked at before each step; a checkpoint is written before stopping.
        advance: Called after each step with its share of the run.

    Raises:
        Stopped: If it was asked to stop.
        UsageError: If the settings cannot be run here, or the folder is another run's.
        LabError: If a file is missing or broken, or the disk refuses.
    """
    fabric = make_fabric(settings.execution.device, settings.precision)
    home = RunFolder(Path(folder)) if folder is not None else None
    claimed = home.claim(settings) if home and fabric.is_global_zero else nullcontext()
    with claimed:
        # Nobody reads what the first process has not looked at.
        fabric.barrier()
        record = home.finished() if home else None
        if record is None:
            record = _Run(settings, fabric, home, asked_to_stop, advance).finish()
        fabric.barrier()
    return record


class _Run:
    """A run that is not finished, and its watcher."""

    def __init__(
        self,
        settings: TrainingSettings,
        fabric: Fabric,
        home: RunFolder | None,
        asked_to_stop: Callable[[], bool],
        advance: Callable[[float], None],
    ) -> None:
        be_deterministic(settings.deterministic)
        seed_everything(settings.seed, "model")
        self._settings, self._fabric = settings, fabric
        self._asked_to_stop, self._advance = asked_to_stop, advance
        self._clocks = (time.perf_counter(), time.process_time())
        self._task: Task = make_task(settings, fabric)
        optimization = settings.optimization
        optimizer = make_optimizer(self._task.model, optimization)
        self._stepper = Stepper(
            fabric, self._task.model, optimizer, self._task.loss, optimization.clip_norm
        )
        self._position = Position()
        self._times: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "cpu_seconds": 0.0,
            "resumed": 0,
        }
        kept = home.restore(self._task.model, optimizer) if home else None
        if kept is not None:
            self._position, self._times = kept
            self._times["resumed"] += 1
        self._saved = time.monotonic()
        # One process writes.
        self._home = home if fabric.is_global_zero else None
        self._logs: Logs | None = None
        if self._home:
            self._logs = open_logs(settings, self._home.path, self._home.metrics, self._position)

    def finish(self) -> TrainingRecord:
        """Train to the end and return the record."""
        optimization = self._settings.optimization
        plan = Plan(
            optimization.epochs,
            self._task.steps,
            optimization.schedule.at,
            self._task.epoch,
            self._evaluate,
            self._settings.evaluate_every,
        )
        why = None
        try:
            run(self._stepper, plan, self._position, self)
        except ValueError as error:
            if not any(words in str(error) for words in ONE_VALUE):
                raise
            why = "the norm sees one value a channel, which torch refuses to train on"
        finally:
            if self._logs:
                self._logs.close()
        record = self._record(why)
        if self._home:
            self._home.finish(record, self._task.model)
        return record

    def before_step(self, position: Position) -> None:
        """Stop if asked to; seed what the step draws, so that nothing before it matters."""
        if self._asked_to_stop():
            self._save()
            raise Stopped
        place = (position.epoch, position.step, self._fabric.global_rank)
        seed_everything(self._settings.seed, "step", *place)

    def after_step(self, position: Position, loss: float) -> None:
        """Log, and write a checkpoint when it is time."""
        epochs = self._settings.optimization.epochs
        self._advance(1 / (self._task.steps * epochs))
        if self._logs:
            self._logs.step(position, loss, self._stepper.optimizer.param_groups[0]["lr"])
        execution = self._settings.execution
        every = execution.checkpoint_steps
        late = time.monotonic() - self._saved > execution.checkpoint_seconds
        # The end of an epoch has its own, after the evaluation.
        if position.step < self._task.steps and (late or (every and position.steps % every == 0)):
            self._save()

    def after_epoch(self, position: Position) -> None:
        """Log the epoch and write a checkpoint."""
        if self._logs:
            self._logs.epoch(position)
        self._save()

    def _save(self) -> None:
        if self._home:
            stepper = self._stepper
            self._home.save(stepper.model, stepper.optimizer, self._position, self._spent())
        self._saved = time.monotonic()

    def _spent(self) -> dict[str, Any]:
        wall, cpu = self._clocks
        return self._times | {
            "seconds": round(self._times["seconds"] + time.perf_counter() - wall, 3),
            "cpu_seconds": round(self._times["cpu_seconds"] + time.process_time() - cpu, 3),
        }

    def _evaluate(self) -> dict[str, float]:
        if self._fabric.world_size > 1:
            # Running statistics are each process's own between two forwards.
            for buffer in self._task.model.buffers():
                distributed.broadcast(buffer, 0)
        return self._task.evaluate()

    def _record(self, why: str | None) -> TrainingRecord:
        position = self._position
        status = "diverged" if position.diverged_at else "failed" if why else "finished"
        place = {**hardware(self._fabric.device), "processes": self._fabric.world_size}
        return TrainingRecord(
            id=self._settings.identity,
            settings=self._settings,
            status=status,
            metrics=position.last,
            best=_best(position.curve, self._task.better),
            curve=position.curve,
            diverged_at=position.diverged_at,
            why=why,
            steps=position.steps,
            facts={**self._task.facts, "commit": commit()},
            times={**self._spent(), "peak_memory": peak_memory(self._fabric.device)},
            versions=versions("lightning-fabric", "torchmetrics"),
            hardware=place,
        )


def _best(curve: list[dict[str, float]], better: dict[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for point in curve:
        for name, value in point.items():
            direction = better.get(name.rpartition("/")[2])
            if direction is None:
                continue
            choose = min if direction == "lower" else max
            found[name] = choose(found[name], value) if name in found else value
    return found
