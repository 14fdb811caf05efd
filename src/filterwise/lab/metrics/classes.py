"""Mean class accuracy and overall accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ClassScores"]


class ClassScores:
    """Shares of what is called what it is: of all samples, and the mean over classes of each one's.

    A class without a sample is left out of the mean; an answer that is not finite is wrong.
    """

    better = {"class_accuracy": "higher", "overall_accuracy": "higher"}  # noqa: RUF012

    def __init__(self, classes: int, device: torch.device) -> None:
        """Make the metric."""
        # One more, for answers that are no class.
        self._counts = MulticlassConfusionMatrix(classes + 1, validate_args=False).to(device)
        self._none = classes

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take the answers to some samples."""
        finite = logits.isfinite().all(dim=1)
        self._counts.update(torch.where(finite, logits.argmax(1), self._none), labels)

    def compute(self) -> dict[str, float]:
        """Return shares from 0 to 1, over all processes."""
        counts = self._counts.compute().double()
        samples, right = counts.sum(1), counts.diagonal()
        there = samples > 0
        return {
            "class_accuracy": round(float((right[there] / samples[there]).mean()), 6),
            "overall_accuracy": round(float(right.sum() / samples.sum()), 6),
        }
