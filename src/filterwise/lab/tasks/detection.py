"""Objects in pictures: boxes, and masks where the model has them; average precision."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from filterwise.lab.data.detection import find_folder, load_scenes
from filterwise.lab.data.samples import StreamedSamples
from filterwise.lab.data.scenes import tensors_of
from filterwise.lab.data.stream import MEAN
from filterwise.lab.dense import rcnn, ssd
from filterwise.lab.dense.backbones import BACKBONES
from filterwise.lab.dense.building import converted
from filterwise.lab.errors import UsageError
from filterwise.lab.metrics.boxes import CocoScores
from filterwise.lab.metrics.voc import VocScores
from filterwise.lab.training.options import DetectionOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_fabric import Fabric
    from torch import Tensor

    from filterwise.lab.data.scenes import Scenes
    from filterwise.lab.training.loop import Step
    from filterwise.lab.training.settings import TrainingSettings

__all__ = ["DETECTORS", "Detection", "detector_of"]

DETECTORS = {
    "mask-rcnn": tuple(BACKBONES),
    "faster-rcnn": tuple(BACKBONES),
    "ssd": ("vgg16", *BACKBONES),
}
"""Beginnings of a model's name, and the backbones that may follow: ``mask-rcnn-resnet50``."""

SCORES = {"coco": CocoScores, "voc07": VocScores}
Sample = tuple[torch.Tensor, dict[str, Any]]


class Detection:
    """Detection and instance segmentation; see `filterwise.lab.tasks.task.Task`."""

    better = CocoScores.better | VocScores.better

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
        model, facts = _model(settings, options, detector, backbone, classes)
        self._dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self.model: nn.Module = model.to(fabric.device, self._dtype).train()
        if settings.execution.compile:
            model.backbone.compile()  # type: ignore[operator]
        if settings.execution.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fabric, self._classes = fabric, classes
        self._scores = SCORES[options.metric]
        train = _Scenes(data.train, self._masks, _changes(settings, options))
        self._samples = StreamedSamples(train, _Scenes(data.test, self._masks), settings, fabric)
        self.steps = self._samples.steps
        self.facts: dict[str, Any] = {
            "data": settings.data.name,
            "origin": data.origin,
            "classes": classes - 1,
            "pictures": {"train": len(data.train.scenes), "test": len(data.test.scenes)},
            "left_out": data.left_out,
            "parameters": sum(each.numel() for each in model.parameters()),
            **facts,
        }

    def epoch(self, number: int, first: int) -> Iterator[Step]:
        """Yield the steps of an epoch from the `first` on."""
        return self._samples.epoch(number, first)

    def loss(self, forward: Callable[..., Any], part: list[Sample]) -> Tensor:
        """Return the sum of the detector's losses over the pictures of a part."""
        losses = forward(*self._inputs(part))
        return torch.stack(list(losses.values())).sum()

    def evaluate(self) -> dict[str, float]:
        """Return the average precision on the test pictures, as the options count it."""
        self.model.eval()
        scores = self._scores(self._classes, self._masks, self._fabric.device)
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
    for detector, backbones in DETECTORS.items():
        before, after = f"{detector}-", name.removeprefix(f"{detector}-")
        if name.startswith(before) and after in backbones:
            return detector, after
    known = [
        f"{detector}-{each}" for detector, backbones in DETECTORS.items() for each in backbones
    ]
    nearest = get_close_matches(name, known, n=1, cutoff=0.4) or known
    raise UsageError(f"model.name: there is no detector {name!r}. Nearest: {nearest[0]}.")


def _model(
    settings: TrainingSettings,
    options: DetectionOptions,
    detector: str,
    backbone: str,
    classes: int,
) -> tuple[nn.Module, dict[str, Any]]:
    wanted = settings.model
    if detector == "ssd":
        if settings.data.size != ssd.SIZE:
            raise UsageError(f"data.size: SSD takes pictures of {ssd.SIZE} pixels.")
        model: nn.Module = ssd.one_shot_detector(backbone, classes, wanted.width)
        places, plain = ssd.PARTS, ()
    else:
        if wanted.width != 1:
            raise UsageError(
                f"model.width: {wanted.name} is made narrower by options.channels and by its"
                " backbone's name."
            )
        masks = detector == "mask-rcnn"
        model = rcnn.region_detector(backbone, masks, classes, settings.data.size, options)
        places, plain = rcnn.PARTS, rcnn.PLAIN
    beginnings = tuple(places[part] for part in options.converted if part in places)

    def takes(name: str) -> bool:
        return name.startswith(beginnings) and not name.startswith(plain)

    return converted(model, wanted, takes, settings.execution, "backbone.body")


def _changes(settings: TrainingSettings, options: DetectionOptions) -> Any:
    """Return what is drawn for a training picture, with and without boxes."""
    flip = v2.RandomHorizontalFlip(settings.data.augmentation.flip)
    if options.augmentation == "flip":
        return flip, flip
    fill: Any = [round(value) for value in MEAN]
    colours = v2.RandomPhotometricDistort()
    # The crop is by overlap with a box; without one there is nothing to go by.
    crops = [v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()]
    return v2.Compose([colours, *crops, flip]), v2.Compose([colours, flip])


class _Scenes:
    """Scenes to read by number; what is drawn for one comes from torch's generator."""

    def __init__(self, scenes: Scenes, masks: bool, changes: Any = None) -> None:
        self._scenes, self._masks, self._changes = scenes.scenes, masks, changes

    def __len__(self) -> int:
        return len(self._scenes)

    def sample(self, number: int) -> Sample:
        scene = self._scenes[number]
        picture, target = tensors_of(scene, self._masks, self._changes is not None)
        if self._changes is None:
            return picture, target
        canvas: Any = (scene.height, scene.width)
        wrapped: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=canvas),  # type: ignore[call-overload]
            "labels": target["labels"],
        }
        if self._masks:
            wrapped["masks"] = tv_tensors.Mask(target["masks"])
        change = self._changes[0 if len(target["boxes"]) else 1]
        picture, changed = change(tv_tensors.Image(picture), wrapped)
        plain = {name: value.as_subclass(torch.Tensor) for name, value in changed.items()}
        return picture.as_subclass(torch.Tensor), {**plain, "seed": int(torch.randint(2**62, ()))}
