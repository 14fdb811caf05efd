"""Mean intersection over union of maps of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchmetrics.classification import MulticlassConfusionMatrix

from filterwise.lab.data.maps import VOID

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["MapScores"]


class MapScores:
    """Mean over classes of the intersection over the union, of all test pixels together.

    For a class: pixels that are it and are called it, over those that are it or are called it. Void
    pixels count nowhere; a class that neither is there nor is found is left out of the mean.
    ``pixel_accuracy`` is the share of pixels that are called what they are.
    """

    better = {"miou": "higher", "pixel_accuracy": "higher"}  # noqa: RUF012

    def __init__(self, classes: int, device: torch.device) -> None:
        """Make the metric."""
        self._counts = MulticlassConfusionMatrix(
            classes, ignore_index=VOID, validate_args=False
        ).to(device)

    def update(self, logits: Tensor, wanted: Tensor) -> None:
        """Take logits ``(pictures, classes, height, width)`` and maps without the classes."""
        self._counts.update(logits.argmax(1), wanted.long())

    def compute(self) -> dict[str, float]:
        """Return shares from 0 to 1, over all processes; none if every pixel was void."""
        counts = self._counts.compute().double()
        right = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - right
        there = union > 0
        if not bool(there.any()):
            return {}
        return {
            "miou": round(float((right[there] / union[there]).mean()), 6),
            "pixel_accuracy": round(float(right.sum() / counts.sum()), 6),
        }
