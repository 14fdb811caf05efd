"""Pictures into classes: cross-entropy, top-1 and top-5 error."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise.lab.data.live import LivePictures
from filterwise.lab.data.loading import kept
from filterwise.lab.data.stream import StreamedPictures, find_tree
from filterwise.lab.errors import UsageError, reason
from filterwise.lab.training.building import build_model
from filterwise.lab.training.mixing import Mixer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.training.loop import Step
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["Classification", "Scores"]

TOO_SMALL = re.compile("[Kk]ernel size can't be greater than|[Oo]utput size is too small")
"""What torch says of convolutions and pooling that find no room on a map."""


class Classification:
    """Classification of pictures; see `filterwise.lab.tasks.task.Task`."""

    better = {"error": "lower", "error_top5": "lower", "loss": "lower"}  # noqa: RUF012

    def __init__(self, settings: TrainingSettings, fabric: Fabric) -> None:
        """Read the data and build the model, whose weights are drawn under the run's seed."""
        execution = settings.execution
        self._batches, data = _read(settings, fabric)
        classes = data.pop("class_names")
        model, _, about = build_model(
            settings.model, data["channels"], len(classes), execution, self._example
        )
        if settings.precision == "64-true":
            model.double()
        self.model: nn.Module = model.to(fabric.device)
        if execution.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mixer = None
        if settings.mixing.kind != "none":
            self._mixer = Mixer(model, settings.mixing)
        if execution.compile:
            self.model.compile()
        self._name, self._fabric = settings.model.name, fabric
        self.steps = self._batches.steps
        self._scores = Scores(len(classes), fabric.device)
        self.facts: dict[str, Any] = {
            **data,
            "classes": len(classes),
            "parameters": sum(each.numel() for each in model.parameters()),
            **about,
        }

    def _example(self) -> Tensor:
        """Return the pictures of the first micro-batch."""
        step = next(iter(self._batches.epoch(0, 0)))
        return step.parts[0][0].to("cpu", torch.float32)

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch from the `first` on."""
        return self._batches.epoch(number, first)

    def loss(self, forward: Callable[..., Any], part: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum of the cross-entropy over the pictures of a part, mixed or as they are."""
        pictures, labels = part
        try:
            if self._mixer is not None:
                return self._mixer.loss(forward, pictures, labels, _sum_of_cross_entropy)
            return _sum_of_cross_entropy(forward(pictures), labels)
        except RuntimeError as error:
            if not TOO_SMALL.search(str(error)):
                raise
            height, width = pictures.shape[2:]
            raise UsageError(
                f"model.name: pictures of {height}x{width} pixels are too small for"
                f" {self._name}: {reason(error)}."
            ) from None

    def evaluate(self) -> dict[str, float]:
        """Return error, top-5 error (of six classes or more) and loss on the test pictures.

        With several sets to test on, each metric has its set's name before it: ``webcam/error``.
        """
        self.model.eval()
        found: dict[str, float] = {}
        with torch.no_grad(), self._fabric.autocast():
            for name in self._batches.tests:
                self._scores.reset()
                for pictures, labels in self._batches.test(name):
                    self._scores.update(self.model(pictures), labels)
                before = f"{name}/" if name else ""
                found |= {before + key: value for key, value in self._scores.compute().items()}
        self.model.train()
        return found


def _sum_of_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def _read(
    settings: TrainingSettings, fabric: Fabric
) -> tuple[LivePictures | StreamedPictures, dict[str, Any]]:
    """Return the batches of a run, and what the record says of the data."""
    data, execution = settings.data, settings.execution
    if data.streamed:
        tree = find_tree(data.name, execution.root)
        streamed = StreamedPictures(tree, settings, fabric)
        facts = {"data": data.name, "origin": streamed.origin, "channels": 3}
        return streamed, {**facts, "class_names": streamed.classes}
    pictures = kept(data.name, execution.root, data.size, execution.download)
    facts = {
        "data": pictures.name,
        "origin": pictures.origin,
        "data_sha256": pictures.sha256,
        "channels": pictures.channels,
        "class_names": pictures.classes,
    }
    return LivePictures(pictures, settings, fabric), facts


class Scores:
    """Error and loss over batches and processes; an answer that is not finite is wrong."""

    def __init__(self, classes: int, device: torch.device) -> None:
        """Make the metrics, whose sums live on the device."""
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        ranks = {"error": 1, "error_top5": 5} if classes > 5 else {"error": 1}
        self._right = MetricCollection(
            {
                name: MulticlassAccuracy(classes, top_k=rank, average="micro", validate_args=False)
                for name, rank in ranks.items()
            }
        ).to(device)
        self._loss = MeanMetric(nan_strategy="disable").to(device)

    def reset(self) -> None:
        """Forget what was seen."""
        self._right.reset()
        self._loss.reset()

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take the answers to some pictures."""
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        answered = logits.isfinite().all(dim=1, keepdim=True)
        # Where an answer is not finite, every class but the right one.
        others = -1e30 * nn.functional.one_hot(labels, logits.shape[1])
        self._right.update(torch.where(answered, logits, others.to(logits.dtype)), labels)
        self._loss.update(losses)

    def compute(self) -> dict[str, float]:
        """Return shares from 0 to 1, and the mean loss where it is finite."""
        # Counted in float32 by the library: six decimals are what is sure up to a million pictures.
        right = self._right.compute()
        found = {name: round(1.0 - float(value), 6) for name, value in right.items()}
        loss = float(self._loss.compute())
        return {**found, "loss": loss} if math.isfinite(loss) else found
