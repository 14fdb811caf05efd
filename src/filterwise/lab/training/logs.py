"""Curves of a run as files and to tracking services."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any, Protocol

from filterwise.lab.errors import UsageError
from filterwise.lab.results import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from filterwise.lab.training.loop import Position
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["Logs", "open_logs"]

STEPS = 50
"""Steps from one logged loss to the next."""


class Logger(Protocol):
    """Takes numbers by step: one curve each."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take values at a step."""

    def close(self) -> None:
        """Write what is left."""


class Logs:
    """Everything that a run's curves are written to."""

    def __init__(self, table: Path, loggers: Sequence[Logger]) -> None:
        """Name the table, and take the loggers."""
        self._table, self._loggers = table, loggers

    def step(self, position: Position, loss: float, rate: float) -> None:
        """Log the loss of a step and its learning rate, of every fiftieth step."""
        if position.steps % STEPS == 0:
            for logger in self._loggers:
                logger.log({"loss": loss, "learning_rate": rate}, position.steps)

    def epoch(self, position: Position) -> None:
        """Log the curve's last point, and write the whole curve as a table."""
        point = {name: value for name, value in position.curve[-1].items() if name != "epoch"}
        for logger in self._loggers:
            logger.log({**point, "epoch": position.epoch}, position.steps)
        write_whole(self._table, _as_csv(position.curve))

    def close(self) -> None:
        """Write what is left."""
        for logger in self._loggers:
            logger.close()


def _as_csv(curve: Sequence[Mapping[str, Any]]) -> bytes:
    """Write a curve whole: after a resumption there is no line twice and none missing."""
    names = list(dict.fromkeys(name for point in curve for name in point))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    return text.getvalue().encode()


def open_logs(settings: TrainingSettings, folder: Path, table: Path, position: Position) -> Logs:
    """Open CSV and TensorBoard, and what the settings name beside them.

    Raises:
        UsageError: If a package for it is not installed.
    """
    makers = {"mlflow": _MLflow, "wandb": _WeightsAndBiases}
    loggers: list[Logger] = [_TensorBoard(folder / "tensorboard", position.steps)]
    for name in settings.execution.loggers:
        try:
            loggers.append(makers[name](settings, folder))
        except ModuleNotFoundError as error:
            raise UsageError(
                f"the logger {name} needs the package {error.name}: pip install"
                " 'filterwise[tracking]'."
            ) from None
    return Logs(table, loggers)


class _TensorBoard:
    def __init__(self, folder: Path, steps: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # What a killed run wrote after its last checkpoint is hidden; it comes again.
        self._writer = SummaryWriter(str(folder), purge_step=steps + 1 if steps else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """A run on the server that MLFLOW_TRACKING_URI names, else in the folder."""

    def __init__(self, settings: TrainingSettings, folder: Path) -> None:
        import os

        import mlflow  # pyright: ignore[reportMissingImports]  # an option, not a need

        if "MLFLOW_TRACKING_URI" not in os.environ:
            # Files: a database would need all of MLflow, and a run's folder has one run.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((folder / "mlruns").absolute().as_uri())
        self._mlflow = mlflow
        mlflow.start_run(run_name=settings.identity, tags={"folder": str(folder)})
        mlflow.log_params({"id": settings.identity, **_flat(settings.model_dump(mode="json"))})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _WeightsAndBiases:
    """A run of the project ``filterwise``; WANDB_MODE=offline keeps it in the folder."""

    def __init__(self, settings: TrainingSettings, folder: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # an option, not a need

        self._run = wandb.init(
            project="filterwise",
            dir=str(folder),
            id=settings.identity,
            resume="allow",
            config=settings.model_dump(mode="json"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
        )
    return found
