"""A class for every pixel: cross-entropy, mean intersection over union."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from filterwise.lab.data.detection import find_folder
from filterwise.lab.data.maps import VOID, load_maps, tensors_of_map
from filterwise.lab.data.samples import StreamedSamples
from filterwise.lab.data.stream import DEVIATION, MEAN
from filterwise.lab.dense.backbones import BACKBONES
from filterwise.lab.dense.building import converted
from filterwise.lab.dense.deeplab import PREDICTOR, deeplab
from filterwise.lab.errors import UsageError
from filterwise.lab.metrics.maps import MapScores
from filterwise.lab.training.options import SegmentationOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.data.maps import Mapped
    from filterwise.lab.training.loop import Step
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["Segmentation"]

BEFORE = "deeplabv3-"
Sample = tuple[torch.Tensor, torch.Tensor]


class Segmentation:
    """Semantic segmentation; see `filterwise.lab.tasks.task.Task`.

    A picture's loss is the mean of the cross-entropy over those of its pixels that are not void, so
    that a step has the same gradient however it is divided. All of a test picture is shown at once.
    """

    better = MapScores.better

    def __init__(self, settings: TrainingSettings, fabric: Fabric) -> None:
        """Look through the data and build the model, whose weights are drawn under the seed."""
        options = settings.options
        assert isinstance(options, SegmentationOptions)
        backbone = settings.model.name.removeprefix(BEFORE)
        if not settings.model.name.startswith(BEFORE) or backbone not in BACKBONES:
            known = [BEFORE + each for each in BACKBONES]
            nearest = get_close_matches(settings.model.name, known, n=1, cutoff=0.4) or known
            raise UsageError(
                f"model.name: there is no segmenter {settings.model.name!r}. Nearest: {nearest[0]}."
            )
        folder = find_folder(settings.data.name, settings.execution.root)
        skip = settings.data.skip_bad
        data = load_maps(folder, options.train, options.test, skip_bad=skip)
        model = deeplab(backbone, len(data.classes), options.channels)
        model, facts = converted(model, settings.model, lambda name: name != PREDICTOR)
        dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self.model: nn.Module = model.to(fabric.device, dtype).train()
        if settings.execution.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.execution.compile:
            self.model.compile()
        self._fabric, self._classes = fabric, len(data.classes)
        self._mean = torch.tensor(MEAN, device=fabric.device, dtype=dtype).view(3, 1, 1)
        self._deviation = torch.tensor(DEVIATION, device=fabric.device, dtype=dtype).view(3, 1, 1)
        train = _Maps(data.train, _changes(settings, options))
        self._samples = StreamedSamples(train, _Maps(data.test), settings, fabric)
        self.steps = self._samples.steps
        self.facts: dict[str, Any] = {
            "data": settings.data.name,
            "origin": data.origin,
            "classes": len(data.classes),
            "pictures": {"train": len(data.train), "test": len(data.test)},
            "left_out": data.left_out,
            "parameters": sum(each.numel() for each in model.parameters()),
            **facts,
        }

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch from the `first` on."""
        return self._samples.epoch(number, first)

    def loss(self, forward: Callable[..., Any], part: list[Sample]) -> Tensor:
        """Return the sum over pictures of the mean loss of a picture's pixels."""
        pictures, wanted = (torch.stack(each) for each in zip(*part, strict=True))
        logits = forward(self._scaled(pictures))["out"]
        losses = nn.functional.cross_entropy(
            logits, wanted.long(), ignore_index=VOID, reduction="none"
        )
        counts = (wanted != VOID).sum((1, 2)).clamp(min=1)
        return (losses.sum((1, 2)) / counts).sum()

    def evaluate(self) -> dict[str, float]:
        """Return mean intersection over union and pixel accuracy on the test pictures."""
        self.model.eval()
        scores = MapScores(self._classes, self._fabric.device)
        with torch.no_grad(), self._fabric.autocast():
            for samples in self._samples.test():
                for picture, wanted in samples:
                    logits = self.model(self._scaled(picture[None]))["out"]
                    scores.update(logits, wanted[None])
        self.model.train()
        return scores.compute()

    def _scaled(self, pictures: Tensor) -> Tensor:
        return (pictures.to(self._mean.dtype) - self._mean) / self._deviation


def _changes(settings: TrainingSettings, options: SegmentationOptions) -> Any:
    """Return scale, crop and flip, drawn from torch's generator; what is added is void."""
    rules = settings.data.augmentation
    fill: Any = {tv_tensors.Image: [round(value) for value in MEAN], tv_tensors.Mask: VOID}
    low, high = options.scales
    flip = v2.RandomHorizontalFlip(rules.flip)
    crop = v2.RandomCrop(rules.crop or settings.data.size, pad_if_needed=True, fill=fill)

    def change(picture: Tensor, wanted: Tensor) -> Sample:
        factor = low + (high - low) * float(torch.rand(()))
        size = [max(1, round(side * factor)) for side in wanted.shape]
        resize = v2.Resize(size, antialias=True)
        both = flip(crop(resize(tv_tensors.Image(picture), tv_tensors.Mask(wanted))))
        first, second = (each.as_subclass(torch.Tensor) for each in both)
        return first, second

    return change


class _Maps:
    """Pictures with maps to read by number."""

    def __init__(self, entries: list[Mapped], change: Any = None) -> None:
        self._entries, self._change = entries, change

    def __len__(self) -> int:
        return len(self._entries)

    def sample(self, number: int) -> Sample:
        sample = tensors_of_map(self._entries[number])
        return sample if self._change is None else self._change(*sample)
