"""Steps of small pictures that live on the device: order, shares of processes, scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from filterwise.lab.errors import UsageError
from filterwise.lab.training.loop import Step
from filterwise.lab.training.seeds import generator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.data import PictureSet
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["LivePictures", "bounds", "order_of", "steps_in"]

TEST_BATCH = 512


class LivePictures:
    """A set of small pictures, all of it on the device as bytes.

    Attributes:
        steps: Optimizer steps in an epoch.
    """

    def __init__(self, data: PictureSet, settings: TrainingSettings, fabric: Fabric) -> None:
        """Move the pictures, or so many of them as the settings say, to the device."""
        self._settings, self._fabric = settings, fabric
        mean, deviation = data.channel_statistics()
        if settings.data.scaling == "unit":
            mean, deviation = torch.zeros_like(mean), torch.full_like(deviation, 255.0)
        dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        device = fabric.device
        self._mean, self._deviation = mean.to(device, dtype), deviation.to(device, dtype)
        train = _some(len(data.train_labels), settings.data.train_samples, "train")
        test = _some(len(data.test_labels), settings.data.test_samples, "test")
        self._pictures = data.train_pictures[train].to(device)
        self._labels = data.train_labels[train].to(device)
        self._test_pictures = data.test_pictures[test].to(device)
        self._test_labels = data.test_labels[test].to(device)
        self._size, self.steps = steps_in(len(self._labels), settings)

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch, this process's micro-batches of each."""
        order = order_of(len(self._labels), self._settings.seed, number).to(self._fabric.device)
        for step in range(first, self.steps):
            chosen = order[step * self._size : (step + 1) * self._size]
            start, end = bounds(len(chosen), self._fabric)
            mine = chosen[start:end]
            pictures, labels = self._scaled(self._pictures[mine]), self._labels[mine]
            size = self._settings.optimization.micro_batch or len(labels)
            parts = list(zip(pictures.split(size), labels.split(size), strict=True))
            yield Step(parts, len(chosen))

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of the test pictures and labels."""
        start, end = bounds(len(self._test_labels), self._fabric)
        pictures, labels = self._test_pictures[start:end], self._test_labels[start:end]
        for part in zip(pictures.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
            yield self._scaled(part[0]), part[1]

    def _scaled(self, pictures: Tensor) -> Tensor:
        scaled = (pictures.to(self._mean.dtype) - self._mean) / self._deviation
        if self._settings.execution.channels_last:
            scaled = scaled.to(memory_format=torch.channels_last)
        return scaled


def steps_in(samples: int, settings: TrainingSettings) -> tuple[int, int]:
    """Return how many samples a step has, and how many steps an epoch."""
    optimization = settings.optimization
    size = min(optimization.step_size, samples)
    left_over = samples % size if optimization.ragged == "keep" else 0
    return size, samples // size + bool(left_over)


def order_of(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's samples, the same in every process."""
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


def bounds(samples: int, fabric: Fabric) -> tuple[int, int]:
    """Return where a process's share of some samples begins and ends.

    Raises:
        UsageError: If there is not one sample for every process.
    """
    processes, rank = fabric.world_size, fabric.global_rank
    if samples < processes:
        raise UsageError(
            f"{processes} processes cannot share a step of {samples} samples. Start fewer, or leave"
            " the ragged last step out (optimization.ragged: drop)."
        )
    return samples * rank // processes, samples * (rank + 1) // processes


def _some(samples: int, wanted: int | None, half: str) -> Tensor:
    """Return which samples are used: the same for every seed of a run."""
    if wanted is None:
        return torch.arange(samples)
    if wanted > samples:
        raise UsageError(f"data.{half}_samples is {wanted}, and there are {samples}.")
    chosen = torch.randperm(samples, generator=generator("subset", half))[:wanted]
    return chosen.sort().values
