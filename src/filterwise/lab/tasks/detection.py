"""Objects in pictures: boxes, and masks where the model has them; average precision."""

from __future__ import annotations

import warnings
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import filterwise as fw
from filterwise.lab.data.detection import find_folder, load_scenes
from filterwise.lab.data.samples import StreamedSamples
from filterwise.lab.data.scenes import tensors_of
from filterwise.lab.dense.backbones import BACKBONES
from filterwise.lab.dense.rcnn import PARTS, PLAIN, region_detector
from filterwise.lab.errors import UsageError
from filterwise.lab.metrics.boxes import CocoScores
from filterwise.lab.training.options import DetectionOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.data.scenes import Scenes
    from filterwise.lab.training.loop import Step
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["DETECTORS", "Detection", "detector_of"]

DETECTORS = ("mask-rcnn", "faster-rcnn")
"""Beginnings of a model's name; a backbone follows: ``mask-rcnn-resnet50``."""

Sample = tuple[torch.Tensor, dict[str, Any]]


class Detection:
    """Detection and instance segmentation; see `filterwise.lab.tasks.task.Task`."""

    better = CocoScores.better

    def __init__(self, settings: TrainingSettings, fabric: Fabric) -> None:
        """Read the data and build the model, whose weights are drawn under the run's seed."""
        options = settings.options
        assert isinstance(options, DetectionOptions)
        folder = find_folder(settings.data.name, settings.execution.root)
        skip = settings.data.skip_bad
        data = load_scenes(folder, options.train, options.test, skip_bad=skip)
        detector, backbone = detector_of(settings.model.name)
        self._masks = detector == "mask-rcnn"
        if self._masks and not (data.train.masks and data.test.masks):
            raise UsageError(
                f"model.name: {settings.model.name} needs masks, and {folder} has none; take"
                f" faster-rcnn-{backbone}."
            )
        classes = len(data.train.classes)
        model = region_detector(backbone, self._masks, classes, settings.data.size, options)
        report = _converted(model, settings.model.recipe, options)
        self._dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self.model: nn.Module = model.to(fabric.device, self._dtype).train()
        if settings.execution.compile:
            model.backbone.compile()
        if settings.execution.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fabric, self._classes = fabric, classes
        flip = settings.data.augmentation.flip
        self._samples = StreamedSamples(
            _Scenes(data.train, self._masks, flip),
            _Scenes(data.test, self._masks),
            settings,
            fabric,
        )
        self.steps = self._samples.steps
        self.facts: dict[str, Any] = {
            "data": settings.data.name,
            "origin": data.origin,
            "classes": classes - 1,
            "pictures": {"train": len(data.train.scenes), "test": len(data.test.scenes)},
            "left_out": data.left_out,
            "parameters": sum(each.numel() for each in model.parameters()),
            "conversion": report.summary,
        }

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch from the `first` on."""
        return self._samples.epoch(number, first)

    def loss(self, forward: Callable[..., Any], part: list[Sample]) -> Tensor:
        """Return the sum of the detector's losses over the pictures of a part."""
        losses = forward(*self._inputs(part))
        return torch.stack(list(losses.values())).sum()

    def evaluate(self) -> dict[str, float]:
        """Return the average precision of boxes, and of masks, on the test pictures."""
        self.model.eval()
        scores = CocoScores(self._classes, self._masks, self._fabric.device)
        with torch.no_grad(), self._fabric.autocast():
            for samples in self._samples.test():
                pictures, wanted = self._inputs(samples)
                scores.update(self.model(pictures), wanted)
        self.model.train()
        return scores.compute()

    def _inputs(self, samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        pictures = [picture.to(self._dtype) / 255 for picture, _ in samples]
        targets = [{**each, "boxes": each["boxes"].to(self._dtype)} for _, each in samples]
        return pictures, targets


def detector_of(name: str) -> tuple[str, str]:
    """Return the detector and the backbone that a model's name means.

    Raises:
        UsageError: If there is no such model.
    """
    for detector in DETECTORS:
        if name.startswith(f"{detector}-") and name.removeprefix(f"{detector}-") in BACKBONES:
            return detector, name.removeprefix(f"{detector}-")
    known = [f"{detector}-{backbone}" for detector in DETECTORS for backbone in BACKBONES]
    nearest = get_close_matches(name, known, n=1, cutoff=0.4) or known
    raise UsageError(f"model.name: there is no detector {name!r}. Nearest: {nearest[0]}.")


def _converted(model: nn.Module, recipe: str, options: DetectionOptions) -> fw.Report:
    beginnings = tuple(PARTS[part] for part in options.converted)

    def outside(name: str, module: nn.Module) -> bool:
        del module
        return not name.startswith(beginnings) or name.startswith(PLAIN)

    def inside(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and not outside(name, module)

    with warnings.catch_warnings():
        # The report carries the same sentences.
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        return fw.convert_(model, recipe, select=inside, exclude=outside)


class _Scenes:
    """Scenes to read by number; what is drawn for one comes from torch's generator."""

    def __init__(self, scenes: Scenes, masks: bool, flip: float | None = None) -> None:
        self._scenes, self._masks, self._training = scenes.scenes, masks, flip is not None
        self._flip = v2.RandomHorizontalFlip(flip or 0.0)

    def __len__(self) -> int:
        return len(self._scenes)

    def sample(self, number: int) -> Sample:
        scene = self._scenes[number]
        picture, target = tensors_of(scene, self._masks, self._training)
        if not self._training:
            return picture, target
        canvas: Any = (scene.height, scene.width)
        wrapped: dict[str, Any] = {
            **target,
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=canvas),  # type: ignore[call-overload]
        }
        if self._masks:
            wrapped["masks"] = tv_tensors.Mask(target["masks"])
        picture, changed = self._flip(tv_tensors.Image(picture), wrapped)
        plain = {name: value.as_subclass(torch.Tensor) for name, value in changed.items()}
        return picture.as_subclass(torch.Tensor), {**plain, "seed": int(torch.randint(2**62, ()))}
