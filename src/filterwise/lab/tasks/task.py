"""What the training engine asks of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from filterwise.lab.training.loop import Step

__all__ = ["Task"]


class Task(Protocol):
    """One run's data, model, loss and metrics; made from `TrainingSettings` and a Fabric.

    Attributes:
        model: What is trained, on its device.
        steps: Optimizer steps in an epoch.
        facts: What the record says of data and model.
        better: For each metric by the last part of its name, ``lower`` or ``higher``.
    """

    model: nn.Module
    steps: int
    facts: dict[str, Any]
    better: dict[str, str]

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch from the `first` on (from 0).

        A step's parts are this process's; what they hold must depend on settings, `number` and
        place in the epoch alone, not on what was asked before: a resumption starts in the middle.
        """
        ...

    def loss(self, forward: Callable[..., Any], part: Any) -> Tensor:
        """Return the sum of the loss over the samples of a part, through `forward`."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the model as it is, over all processes; it is left in training."""
        ...
