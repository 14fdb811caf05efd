"""Steps of samples that are read from disk as they are needed, whatever a sample is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from filterwise.lab.data.order import order_of, share_of, some, steps_in
from filterwise.lab.errors import LabError
from filterwise.lab.training.loop import Step
from filterwise.lab.training.seeds import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_fabric import Fabric

    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["Samples", "StreamedSamples"]


class Samples(Protocol):
    """What can be read by number."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def sample(self, number: int) -> Any:
        """Read one: tensors in dictionaries and tuples; random draws come from torch's generator.

        Raises:
            LabError: If it cannot be read.
        """
        ...


class StreamedSamples:
    """Samples to train on and to test on, in lists: they may differ in size.

    What is drawn for a sample depends on the run's seed, the epoch and the sample alone: the number
    of workers changes nothing, and a resumption finds the same.

    Attributes:
        steps: Optimizer steps in an epoch.
    """

    def __init__(
        self,
        train: Samples,
        test: Samples,
        settings: TrainingSettings,
        fabric: Fabric,
        test_batch: int = 1,
    ) -> None:
        """Take the samples; nothing is read yet."""
        self._settings, self._fabric, self._test_batch = settings, fabric, test_batch
        self._train = some(len(train), settings.data.train_samples, "train")
        self._test = some(len(test), settings.data.test_samples, "test")
        self._read = _Seeded(train, settings.seed)
        self._read_test = _Seeded(test, settings.seed)
        self._size, self.steps = steps_in(len(self._train), settings)

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch, this process's micro-batches of each as lists of samples."""
        order = self._train[order_of(len(self._train), self._settings.seed, number)]
        steps = [
            order[step * self._size : (step + 1) * self._size] for step in range(first, self.steps)
        ]
        mine = [chosen[share_of(len(chosen), self._fabric)].tolist() for chosen in steps]
        self._read.epoch = number
        for chosen, samples in zip(steps, self._loaded(self._read, mine), strict=True):
            size = self._settings.optimization.micro_batch or len(samples)
            parts = [samples[start : start + size] for start in range(0, len(samples), size)]
            yield Step(parts, len(chosen))

    def test(self) -> Iterator[list[Any]]:
        """Yield this process's share of the samples to test on."""
        mine = self._test[share_of(len(self._test), self._fabric)]
        parts = [part.tolist() for part in mine.split(self._test_batch)]
        yield from self._loaded(self._read_test, parts)

    def _loaded(self, samples: _Seeded, batches: Sequence[list[int]]) -> Iterator[list[Any]]:
        loader = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=self._settings.execution.workers,
            collate_fn=list,
            pin_memory=self._fabric.device.type == "cuda",
            # Seeds of workers, which are not used, come from here and not from the run's own.
            generator=torch.Generator(),
        )
        for batch in loader:
            broken = [sample for sample in batch if isinstance(sample, str)]
            if broken:
                # An exception would come out of a worker with its traceback in its words.
                raise LabError(broken[0])
            yield self._fabric.to_device(batch)


class _Seeded(Dataset):
    """Samples under a seed of their own."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self._samples, self._seed, self.epoch = samples, seed, 0

    def __getitem__(self, number: int) -> Any:
        # The main process reads, too, when there are no workers: its own draws must not move.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self._seed, "sample", self.epoch, number))
            try:
                return self._samples.sample(number)
            except LabError as error:
                return str(error)
