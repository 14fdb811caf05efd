"""Epochs and steps, and what a run has come to so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from filterwise.lab.training.schedules import Rates
    from filterwise.lab.training.stepper import Stepper

__all__ = ["Plan", "Position", "Step", "Stopped", "Watcher", "run"]


class Stopped(Exception):
    """The run was asked to stop before its end."""


class Step(NamedTuple):
    """What one optimizer step is taken on.

    Attributes:
        parts: This process's micro-batches.
        samples: Number of samples in the micro-batches of all processes.
    """

    parts: Sequence[Any]
    samples: int


@dataclass
class Position:
    """Where a run stands, at a step boundary: plain numbers and lists, as a checkpoint holds them.

    Attributes:
        epoch: Finished epochs.
        step: Steps taken in the epoch after those.
        steps: Steps taken in all.
        losses: Sum over those of the running epoch of the mean loss of a step.
        curve: A point for each finished epoch: ``epoch``, ``train_loss`` and what the evaluation
            returned.
        diverged_at: Epoch (from 1) and step in it (from 1) at which the loss was not finite.
        last: What the last evaluation returned.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    losses: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    diverged_at: tuple[int, int] | None = None
    last: dict[str, Any] = field(default_factory=dict)


class Plan(NamedTuple):
    """What a run goes through.

    Attributes:
        epochs: How many.
        steps: Optimizer steps in each.
        rates: What a step is taken with, from its time in epochs and the number of epochs.
        epoch: The steps of an epoch (from 0), without the first few.
        evaluate: What the model is worth as it stands, as plain numbers.
        every: Epochs from one evaluation to the next; the last epoch has one in any case.
    """

    epochs: int
    steps: int
    rates: Callable[[float, float], Rates]
    epoch: Callable[[int, int], Iterable[Step]]
    evaluate: Callable[[], dict[str, Any]]
    every: int = 1


class Watcher(Protocol):
    """Who is told how a run goes; any of them may raise `Stopped`."""

    def before_step(self, position: Position) -> None:
        """Hear that a step is about to be taken."""

    def after_step(self, position: Position, loss: float) -> None:
        """Hear that a step was taken, and the mean loss of its samples."""

    def after_epoch(self, position: Position) -> None:
        """Hear that an epoch is finished; its point is the last of the curve."""


def run(stepper: Stepper, plan: Plan, position: Position, watcher: Watcher) -> None:
    """Take all steps from a position on, or those up to a loss that is not finite.

    The position moves along; at every call of the watcher it is a step boundary from which the run
    can be taken up again, with the model and the optimizer as they then are.
    """
    while position.epoch < plan.epochs and position.diverged_at is None:
        for step in plan.epoch(position.epoch, position.step):
            watcher.before_step(position)
            time = position.epoch + position.step / plan.steps
            stepper.set_rates(plan.rates(time, plan.epochs))
            loss = stepper.step(step.parts, step.samples)
            if not math.isfinite(loss):
                position.diverged_at = (position.epoch + 1, position.step + 1)
                position.last = plan.evaluate()
                return
            position.step += 1
            position.steps += 1
            position.losses += loss
            watcher.after_step(position, loss)
        _close_epoch(plan, position)
        watcher.after_epoch(position)


def _close_epoch(plan: Plan, position: Position) -> None:
    mean = position.losses / position.step
    position.epoch, position.step, position.losses = position.epoch + 1, 0, 0.0
    found: dict[str, Any] = {}
    if position.epoch % plan.every == 0 or position.epoch == plan.epochs:
        found = position.last = plan.evaluate()
    position.curve.append({"epoch": position.epoch, "train_loss": mean, **found})
