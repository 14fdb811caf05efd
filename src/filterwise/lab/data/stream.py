"""Steps of large pictures, read from disk by worker processes as they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from filterwise.lab.data.folder import halves, read_picture
from filterwise.lab.data.order import order_of, share_of, some, steps_in
from filterwise.lab.errors import LabError, UsageError
from filterwise.lab.training.loop import Step
from filterwise.lab.training.seeds import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_fabric import Fabric
    from torch import Tensor
    from torchvision.datasets import ImageFolder

    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["StreamedPictures", "find_tree"]

MEAN = (123.675, 116.28, 103.53)
DEVIATION = (58.395, 57.12, 57.375)
"""Of ImageNet's channels, as everybody uses them; of other large sets, too."""
TEST_BATCH = 64


def find_tree(name: str, root: str) -> Path:
    """Return the class-folder tree that a name or a path means.

    Archives of ImageNet as its owners hand them out (``ILSVRC2012_img_train.tar`` and others) are
    unpacked where they lie, by torchvision.

    Raises:
        UsageError: If there is none.
    """
    if name.lower() != "imagenet":
        path = Path(name).expanduser()
        if not path.is_dir():
            raise UsageError(f"--data: there is no folder {name}.")
        return path.resolve()
    here = Path(root).expanduser()
    for path in (here / "imagenet", here):
        if (path / "ILSVRC2012_img_val.tar").exists() and not (path / "val").exists():
            _unpack(path)
        if (path / "train").is_dir():
            return path
    raise UsageError(
        f"--data: ImageNet is not in {here}: neither imagenet/train/CLASS/picture nor the archives"
        " ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which"
        " image-net.org hands out to those who register. Name the folder with --root."
    )


def _unpack(path: Path) -> None:
    from torchvision.datasets import ImageNet

    try:
        for split in ("train", "val"):
            ImageNet(str(path), split=split)
    except Exception as error:
        # Whatever tar and scipy come upon in a broken archive.
        raise LabError(f"--data: the archives in {path} cannot be unpacked: {error}.") from None


class StreamedPictures:
    """A class-folder tree, read as it is needed.

    What is drawn for a picture depends on the run's seed, the epoch and the picture alone: the
    number of workers changes nothing, and a resumption finds the same.

    Attributes:
        steps: Optimizer steps in an epoch.
        tests: The one set to test on, without a name.
        classes: Name of each label.
        origin: One sentence on where it comes from.
    """

    def __init__(self, tree: Path, settings: TrainingSettings, fabric: Fabric) -> None:
        """Look through the tree; nothing is read yet."""
        self._settings, self._fabric = settings, fabric
        train, test = halves(tree)
        self.classes = tuple(train.classes)
        self.tests = {"": test}
        self._train = some(len(train.samples), settings.data.train_samples, "train")
        self._test = some(len(test.samples), settings.data.test_samples, "test")
        self._read = _Pictures(train, settings, training=True)
        self._read_test = _Pictures(test, settings, training=False)
        self._size, self.steps = steps_in(len(self._train), settings)
        mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
        if settings.data.scaling == "unit":
            mean, deviation = torch.zeros(3), torch.full((3,), 255.0)
        dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self._mean = mean.view(1, 3, 1, 1).to(fabric.device, dtype)
        self._deviation = deviation.view(1, 3, 1, 1).to(fabric.device, dtype)
        self.origin = f"pictures in {tree}, read as they are needed"

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch, this process's micro-batches of each."""
        order = self._train[order_of(len(self._train), self._settings.seed, number)]
        steps = [
            order[step * self._size : (step + 1) * self._size] for step in range(first, self.steps)
        ]
        mine = [chosen[share_of(len(chosen), self._fabric)].tolist() for chosen in steps]
        self._read.epoch = number
        for chosen, (pictures, labels) in zip(steps, self._loaded(self._read, mine), strict=True):
            size = self._settings.optimization.micro_batch or len(labels)
            parts = list(zip(pictures.split(size), labels.split(size), strict=True))
            yield Step(parts, len(chosen))

    def test(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of the test pictures and labels."""
        del name
        mine = self._test[share_of(len(self._test), self._fabric)]
        yield from self._loaded(self._read_test, [part.tolist() for part in mine.split(TEST_BATCH)])

    def _loaded(
        self, pictures: _Pictures, batches: Sequence[list[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._fabric.device
        loader = DataLoader(
            pictures,
            batch_sampler=batches,
            num_workers=self._settings.execution.workers,
            collate_fn=_collated,
            pin_memory=device.type == "cuda",
            # Seeds of workers, which are not used, come from here and not from the run's own.
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, str):
                # An exception would come out of a worker with its traceback in its words.
                raise LabError(batch)
            stack, labels = (part.to(device, non_blocking=True) for part in batch)
            scaled = (stack.to(self._mean.dtype) - self._mean) / self._deviation
            if self._settings.execution.channels_last:
                scaled = scaled.to(memory_format=torch.channels_last)
            yield scaled, labels


class _Pictures(Dataset):
    """One half of a tree: pictures of one size as bytes, drawn by seed, epoch and number."""

    def __init__(self, folder: ImageFolder, settings: TrainingSettings, training: bool) -> None:
        self._samples, self._seed, self.epoch = folder.samples, settings.seed, 0
        self._transform = _transform(settings, training)

    def __getitem__(self, number: int) -> tuple[Tensor, int] | str:
        path, label = self._samples[number]
        try:
            picture = read_picture(path)
        except LabError as error:
            return str(error)
        # The main process reads, too, when there are no workers: its own draws must not move.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self._seed, "picture", self.epoch, number))
            return self._transform(picture), label


def _transform(settings: TrainingSettings, training: bool) -> Any:
    from torchvision.transforms import v2

    rules, size = settings.data.augmentation, settings.data.size
    if training and rules.random_resized:
        steps: list[Any] = [v2.RandomResizedCrop(rules.crop or size, antialias=True)]
    elif training:
        steps = [v2.Resize(size), v2.RandomCrop(rules.crop or size, padding=rules.padding or None)]
    else:
        steps = [v2.Resize(size), v2.CenterCrop(rules.crop or size)]
    if training and rules.flip:
        steps.append(v2.RandomHorizontalFlip(rules.flip))
    steps.append(v2.PILToTensor())
    if training and rules.erasing:
        mean: Any = [round(value) for value in MEAN]
        steps.append(v2.RandomErasing(rules.erasing, value=mean))
    return v2.Compose(steps)


def _collated(samples: list[Any]) -> Any:
    broken = [sample for sample in samples if isinstance(sample, str)]
    return broken[0] if broken else default_collate(samples)
