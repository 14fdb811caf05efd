"""Clouds of points into classes: cross-entropy, mean class accuracy and overall accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise.lab.data.clouds import load_clouds
from filterwise.lab.data.detection import find_folder
from filterwise.lab.data.samples import StreamedSamples
from filterwise.lab.dense.building import converted
from filterwise.lab.dense.dgcnn import PointNetwork
from filterwise.lab.errors import UsageError
from filterwise.lab.metrics.classes import ClassScores
from filterwise.lab.training.options import PointOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.training.loop import Step
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["Points"]

NAME = "dgcnn"
STRETCH = (2 / 3, 3 / 2)
SHIFT = 0.2
TEST_BATCH = 16
Sample = tuple[torch.Tensor, int]


class Points:
    """Classification of shapes; see `filterwise.lab.tasks.task.Task`.

    A training cloud is stretched along each axis by a factor from 2/3 to 3/2 and moved by up to 0.2
    (Wang et al., arXiv 1801.07829); its points are drawn from those that there are. A test cloud is
    its first points.
    """

    better = ClassScores.better

    def __init__(self, settings: TrainingSettings, fabric: Fabric) -> None:
        """Read the data and build the model, whose weights are drawn under the run's seed."""
        options = settings.options
        assert isinstance(options, PointOptions)
        if settings.model.name != NAME:
            raise UsageError(
                f"model.name: the network of points is {NAME}, not {settings.model.name!r}."
            )
        if options.neighbours > options.points:
            raise UsageError(
                f"options.neighbours: {options.neighbours} of {options.points} points."
            )
        folder = find_folder(settings.data.name, settings.execution.root)
        data = load_clouds(folder, options.points, skip_bad=settings.data.skip_bad)
        model: nn.Module = PointNetwork(len(data.classes), options.neighbours, options.dropout)
        model, facts = converted(
            model, settings.model, lambda name: name != "classifier", settings.execution
        )
        self._dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self.model: nn.Module = model.to(fabric.device, self._dtype).train()
        if settings.execution.compile:
            self.model.compile()
        self._fabric, self._classes = fabric, len(data.classes)
        train = _Clouds(*data.train, options.points, training=True)
        test = _Clouds(*data.test, options.points, training=False)
        self._samples = StreamedSamples(train, test, settings, fabric, TEST_BATCH)
        self.steps = self._samples.steps
        self.facts: dict[str, Any] = {
            "data": settings.data.name,
            "origin": data.origin,
            "classes": len(data.classes),
            "shapes": {"train": len(data.train[0]), "test": len(data.test[0])},
            "left_out": data.left_out,
            "parameters": sum(each.numel() for each in model.parameters()),
            **facts,
        }

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch from the `first` on."""
        return self._samples.epoch(number, first)

    def loss(self, forward: Callable[..., Any], part: list[Sample]) -> Tensor:
        """Return the sum of the cross-entropy over the clouds of a part."""
        clouds, labels = self._inputs(part)
        return nn.functional.cross_entropy(forward(clouds), labels, reduction="sum")

    def evaluate(self) -> dict[str, float]:
        """Return mean class accuracy and overall accuracy on the test shapes."""
        self.model.eval()
        scores = ClassScores(self._classes, self._fabric.device)
        with torch.no_grad(), self._fabric.autocast():
            for samples in self._samples.test():
                clouds, labels = self._inputs(samples)
                scores.update(self.model(clouds).float(), labels)
        self.model.train()
        return scores.compute()

    def _inputs(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        clouds = torch.stack([cloud for cloud, _ in samples]).to(self._dtype)
        labels = torch.tensor([label for _, label in samples], device=self._fabric.device)
        return clouds.transpose(1, 2), labels


class _Clouds:
    """Clouds in memory, by number."""

    def __init__(
        self, clouds: list[Tensor], labels: list[int], points: int, training: bool
    ) -> None:
        self._clouds, self._labels = clouds, labels
        self._points, self._training = points, training

    def __len__(self) -> int:
        return len(self._clouds)

    def sample(self, number: int) -> Sample:
        cloud, label = self._clouds[number], self._labels[number]
        if not self._training:
            return cloud[: self._points], label
        chosen = cloud[torch.randperm(len(cloud))[: self._points]]
        low, high = STRETCH
        factors = low + (high - low) * torch.rand(3)
        return chosen * factors + SHIFT * (2 * torch.rand(3) - 1), label
