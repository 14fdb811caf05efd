"""Clips into classes: cross-entropy, top-1 and top-5 error."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision.transforms import v2

from filterwise.lab.data.clips import frames_of, load_clips
from filterwise.lab.data.detection import find_folder
from filterwise.lab.data.samples import StreamedSamples
from filterwise.lab.data.stream import DEVIATION, MEAN
from filterwise.lab.dense.backbones import BACKBONES
from filterwise.lab.dense.building import converted
from filterwise.lab.dense.tsm import clip_network
from filterwise.lab.errors import UsageError
from filterwise.lab.tasks.classification import Scores
from filterwise.lab.training.options import VideoOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.data.clips import Clip
    from filterwise.lab.training.loop import Step
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["Video"]

BEFORE = "tsm-"
SCALES = (1.0, 0.875, 0.75, 0.66)
"""Sides of training crops, as shares of the shorter side (Wang et al., arXiv 1608.00859)."""
TEST_BATCH = 8
Sample = tuple[torch.Tensor, int]


class Video:
    """Classification of clips; see `filterwise.lab.tasks.task.Task`."""

    better = {"error": "lower", "error_top5": "lower", "loss": "lower"}  # noqa: RUF012

    def __init__(self, settings: TrainingSettings, fabric: Fabric) -> None:
        """Look through the data and build the model, whose weights are drawn under the seed."""
        options = settings.options
        assert isinstance(options, VideoOptions)
        backbone = settings.model.name.removeprefix(BEFORE)
        if not settings.model.name.startswith(BEFORE) or backbone not in BACKBONES:
            known = [BEFORE + each for each in BACKBONES]
            nearest = get_close_matches(settings.model.name, known, n=1, cutoff=0.4) or known
            raise UsageError(
                f"model.name: there is no network of clips {settings.model.name!r}. Nearest:"
                f" {nearest[0]}."
            )
        folder = find_folder(settings.data.name, settings.execution.root)
        data = load_clips(folder, options.frames, skip_bad=settings.data.skip_bad)
        model: nn.Module = clip_network(
            backbone, len(data.classes), options.frames, options.dropout
        )
        model, facts = converted(
            model, settings.model, lambda name: name != "body.fc", settings.execution, "body"
        )
        dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self.model: nn.Module = model.to(fabric.device, dtype).train()
        if settings.execution.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.execution.compile:
            self.model.compile()
        self._fabric = fabric
        self._mean = torch.tensor(MEAN, device=fabric.device, dtype=dtype).view(3, 1, 1)
        self._deviation = torch.tensor(DEVIATION, device=fabric.device, dtype=dtype).view(3, 1, 1)
        self._scores = Scores(len(data.classes), fabric.device)
        train = _Clips(data.train, options.frames, _Crop(settings))
        test = _Clips(data.test, options.frames, _middle(settings), training=False)
        self._samples = StreamedSamples(train, test, settings, fabric, TEST_BATCH)
        self.steps = self._samples.steps
        self.facts: dict[str, Any] = {
            "data": settings.data.name,
            "origin": data.origin,
            "classes": len(data.classes),
            "clips": {"train": len(data.train), "test": len(data.test)},
            "left_out": data.left_out,
            "parameters": sum(each.numel() for each in model.parameters()),
            **facts,
        }

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch from the `first` on."""
        return self._samples.epoch(number, first)

    def loss(self, forward: Callable[..., Any], part: list[Sample]) -> Tensor:
        """Return the sum of the cross-entropy over the clips of a part."""
        clips, labels = self._inputs(part)
        return nn.functional.cross_entropy(forward(clips), labels, reduction="sum")

    def evaluate(self) -> dict[str, float]:
        """Return error, top-5 error (of six classes or more) and loss on the test clips."""
        self.model.eval()
        self._scores.reset()
        with torch.no_grad(), self._fabric.autocast():
            for samples in self._samples.test():
                clips, labels = self._inputs(samples)
                self._scores.update(self.model(clips), labels)
        self.model.train()
        return self._scores.compute()

    def _inputs(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        clips = torch.stack([clip for clip, _ in samples]).to(self._mean.dtype)
        labels = torch.tensor([label for _, label in samples], device=self._fabric.device)
        return (clips - self._mean) / self._deviation, labels


class _Crop:
    """A part of all frames of a clip, of one of four sizes in each direction, at a drawn place."""

    def __init__(self, settings: TrainingSettings) -> None:
        self._side = settings.data.augmentation.crop or settings.data.size
        self._flip = v2.RandomHorizontalFlip(settings.data.augmentation.flip)

    def __call__(self, frames: Tensor) -> Tensor:
        high, wide = frames.shape[-2:]
        least = min(high, wide)
        first = int(torch.randint(len(SCALES), ()))
        # Height and width are at most one size apart: shapes stay near a square.
        near = [place for place in range(len(SCALES)) if abs(place - first) <= 1]
        second = near[int(torch.randint(len(near), ()))]
        height, width = (max(1, round(SCALES[place] * least)) for place in (first, second))
        top = int(torch.randint(high - height + 1, ()))
        left = int(torch.randint(wide - width + 1, ()))
        size = [self._side, self._side]
        found = v2.functional.resized_crop(frames, top, left, height, width, size, antialias=True)
        return self._flip(found)


def _middle(settings: TrainingSettings) -> Any:
    side = settings.data.augmentation.crop or settings.data.size
    return v2.Compose([v2.Resize(settings.data.size, antialias=True), v2.CenterCrop(side)])


class _Clips:
    """Clips to read by number."""

    def __init__(self, clips: list[Clip], count: int, change: Any, training: bool = True) -> None:
        self._clips, self._count, self._change, self._training = clips, count, change, training

    def __len__(self) -> int:
        return len(self._clips)

    def sample(self, number: int) -> Sample:
        clip = self._clips[number]
        return self._change(frames_of(clip, self._count, self._training)), clip.label
