"""What a finished run leaves to read: one JSON object."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from filterwise.lab.settings import Frozen
from filterwise.lab.training.settings import TrainingSettings

__all__ = ["FORMAT", "TrainingRecord"]

FORMAT = 1
"""Number of this layout of a record."""


class TrainingRecord(Frozen):
    """One finished run.

    Attributes:
        format: `FORMAT`.
        id: Hash of the settings, `TrainingSettings.identity`.
        settings: Everything about the run.
        status: ``finished``, ``diverged`` (a loss was not finite; `metrics` are of the model as it
            stood then) or ``failed`` (it cannot be trained under these settings; `why` says why).
        metrics: Of the last evaluation, by name: ``error``, or ``webcam/error`` with several sets.
        best: Of each metric the best value over the curve.
        curve: For each finished epoch ``epoch``, ``train_loss`` and, where evaluated, the metrics.
        diverged_at: Epoch and step in it, both from 1.
        why: Why it failed.
        steps: Optimizer steps taken.
        facts: What the task says of its data and model.
        times: ``started`` (UTC), ``seconds``, ``cpu_seconds``, ``resumed`` (how many times),
            ``peak_memory`` in bytes.
        versions: Of python, filterwise and what it stands on, and the commit.
        hardware: Processor, cores, threads, device, processes.
    """

    format: int = FORMAT
    id: str
    settings: TrainingSettings
    status: str
    metrics: dict[str, float]
    best: dict[str, float]
    curve: list[dict[str, float]]
    diverged_at: tuple[int, int] | None
    why: str | None
    steps: int
    facts: dict[str, Any]
    times: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]

    @model_validator(mode="after")
    def _same_identity(self) -> TrainingRecord:
        if self.format != FORMAT:
            raise ValueError(f"its format is {self.format}, this program reads {FORMAT}")
        if self.id != self.settings.identity:
            raise ValueError(f"its id {self.id} is not that of its settings")
        return self
