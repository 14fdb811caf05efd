"""Steps of small pictures that live on the device, augmented there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from filterwise.lab.data.augment import cropped, draw, erased
from filterwise.lab.data.order import order_of, share_of, some, steps_in
from filterwise.lab.errors import UsageError
from filterwise.lab.training.loop import Step
from filterwise.lab.training.seeds import generator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.data.pictures import PictureSet
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["LivePictures"]

TEST_BATCH = 512


class LivePictures:
    """A set of small pictures, all of it on the device as bytes.

    Attributes:
        steps: Optimizer steps in an epoch.
        tests: Names of the sets to test on; one without a name if there is one only.
    """

    def __init__(self, data: PictureSet, settings: TrainingSettings, fabric: Fabric) -> None:
        """Move the pictures, or so many of them as the settings say, to the device.

        Raises:
            UsageError: If there are not so many, or the crop is larger than a padded picture.
        """
        self._settings, self._fabric = settings, fabric
        self._rules = settings.data.augmentation
        mean, deviation = data.channel_statistics()
        self._fill = mean if self._rules.fill == "mean" else torch.zeros_like(mean)
        if settings.data.scaling == "unit":
            mean, deviation = torch.zeros_like(mean), torch.full_like(deviation, 255.0)
        dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        device = fabric.device
        self._mean, self._deviation = mean.to(device, dtype), deviation.to(device, dtype)
        train = some(len(data.train_labels), settings.data.train_samples, "train")
        self._pictures = data.train_pictures[train].to(device)
        self._labels = data.train_labels[train].to(device)
        self.tests: dict[str, tuple[Tensor, Tensor]] = {}
        halves = {data.origin_domain: (data.test_pictures, data.test_labels), **data.domains}
        for name, (pictures, labels) in halves.items():
            test = some(len(labels), settings.data.test_samples, "test")
            self.tests[name] = pictures[test].to(device), labels[test].to(device)
        self._size, self.steps = steps_in(len(self._labels), settings)
        self._check_crop()

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch, this process's micro-batches of each."""
        order = order_of(len(self._labels), self._settings.seed, number).to(self._fabric.device)
        for step in range(first, self.steps):
            chosen = order[step * self._size : (step + 1) * self._size]
            share = share_of(len(chosen), self._fabric)
            mine = chosen[share]
            pictures = self._augmented(self._pictures[mine], share, len(chosen), number, step)
            labels = self._labels[mine]
            size = self._settings.optimization.micro_batch or len(labels)
            parts = list(zip(pictures.split(size), labels.split(size), strict=True))
            yield Step(parts, len(chosen))

    def test(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of a set's pictures and labels, cropped in the middle."""
        pictures, labels = self.tests[name]
        share = share_of(len(labels), self._fabric)
        side = self._rules.crop
        for part, answers in zip(
            pictures[share].split(TEST_BATCH), labels[share].split(TEST_BATCH), strict=True
        ):
            if side:
                top, left = ((extent - side) // 2 for extent in part.shape[2:])
                part = part[:, :, max(top, 0) : max(top, 0) + side, max(left, 0) :][..., :side]
            yield self._scaled(part), answers

    def _augmented(
        self, pictures: Tensor, share: slice, samples: int, epoch: int, step: int
    ) -> Tensor:
        rules = self._rules
        if not (rules.padding or rules.crop or rules.flip or rules.erasing):
            return self._scaled(pictures)
        # Drawn for the whole step, so that every process finds its own pictures' draws.
        dice = generator(self._settings.seed, "augmentation", epoch, step)
        height, width = pictures.shape[2:]
        draws = draw(samples, height, width, rules, dice).part(share, pictures.device)
        pictures = self._scaled(cropped(pictures, draws, rules, self._fill))
        return erased(pictures, draws) if rules.erasing else pictures

    def _scaled(self, pictures: Tensor) -> Tensor:
        scaled = (pictures.to(self._mean.dtype) - self._mean) / self._deviation
        if self._settings.execution.channels_last:
            scaled = scaled.to(memory_format=torch.channels_last)
        return scaled

    def _check_crop(self) -> None:
        side, padding = self._rules.crop, self._rules.padding
        least = min(self._pictures.shape[2:])
        if side and side > least + 2 * padding:
            raise UsageError(
                f"data.augmentation.crop is {side}, and pictures of {least} pixels padded by"
                f" {padding} have {least + 2 * padding}."
            )
