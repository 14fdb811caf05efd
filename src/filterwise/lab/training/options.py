"""What a task asks beside data, model and optimization: one class for each task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from filterwise.lab.settings import Frozen

__all__ = [
    "ClassificationOptions",
    "DetectionOptions",
    "PointOptions",
    "SegmentationOptions",
    "TaskOptions",
    "VideoOptions",
    "of_the_task",
]

Count = Annotated[int, Field(ge=1)]
Factor = Annotated[float, Field(gt=0, le=16)]
Part = Literal["backbone", "fpn", "heads", "predictors"]
EVERYWHERE: tuple[Part, ...] = ("backbone", "fpn", "heads")


class ClassificationOptions(Frozen):
    """Classification of pictures asks for nothing more."""

    kind: Literal["classification"] = "classification"


class DetectionOptions(Frozen):
    """Objects in pictures: boxes, and masks where the model has them.

    The shorter side of a picture is brought to ``data.size``, unless the longer one would then be
    longer than `longest`.

    Attributes:
        metric: ``coco``: average precision over overlaps; ``voc07``: eleven-point average precision
            at an overlap of one half.
        augmentation: ``flip``: as the data's settings say; ``ssd``: colours, zooming out and
            crops by overlap before that (Liu et al., arXiv 1512.02325).
        train: Parts of the data to train on, as the folder names them: ``train2017``, or
            ``VOC2007/trainval``; none: what there is by its usual name.
        test: Likewise to test on.
        sizes: Shorter sides of which one is drawn for each training picture; none: ``data.size``.
        longest: Most pixels of the longer side.
        normalized: Where activation norms stand; SSD has them in all of its backbone. The region
            proposals and the predictors have none.
        converted: Where the recipe applies, as far as there are layers; region proposals and the
            predictors behind them stay plain in any case, those of SSD unless they are named.
        frozen: Batch norms of the backbone keep their statistics and affine values.
        channels: Of the pyramid and of the heads.
        proposals: Boxes of a picture that the heads are trained on.
    """

    kind: Literal["detection"] = "detection"
    metric: Literal["coco", "voc07"] = "coco"
    augmentation: Literal["flip", "ssd"] = "flip"
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    sizes: tuple[Annotated[int, Field(ge=8, le=4096)], ...] = ()
    longest: Annotated[int, Field(ge=8, le=8192)] = 1333
    normalized: tuple[Part, ...] = EVERYWHERE
    converted: tuple[Part, ...] = EVERYWHERE
    frozen: bool = False
    channels: Annotated[int, Field(ge=8, le=1024)] = 256
    proposals: Count = 512


class SegmentationOptions(Frozen):
    """A class for every pixel of a picture.

    Training pictures are resized by a factor drawn from `scales`, and squares of
    ``data.augmentation.crop`` pixels (``data.size`` without one) are cut out of them.

    Attributes:
        train: Parts of the data to train on: ``VOC2012/train``, or a folder's name; none: what
            there is by its usual name.
        test: Likewise to test on.
        scales: Smallest and largest factor.
        channels: Of the pyramid.
    """

    kind: Literal["segmentation"] = "segmentation"
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    scales: tuple[Factor, Factor] = (0.5, 2.0)
    channels: Annotated[int, Field(ge=8, le=1024)] = 256


class VideoOptions(Frozen):
    """Clips into classes; frames have ``data.size`` pixels on their shorter side.

    Attributes:
        frames: Of a clip, one out of each of as many equal parts of it.
        dropout: Before the classifier.
    """

    kind: Literal["video"] = "video"
    frames: Annotated[int, Field(ge=2, le=128)] = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5


class PointOptions(Frozen):
    """Clouds of points into classes.

    Attributes:
        points: Of a cloud, drawn from those that there are.
        neighbours: Of a point, in the network's graphs.
        dropout: Before each of the last two linear layers.
    """

    kind: Literal["points"] = "points"
    points: Annotated[int, Field(ge=2, le=65536)] = 1024
    neighbours: Annotated[int, Field(ge=1, le=128)] = 20
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5


TaskOptions = Annotated[
    ClassificationOptions | DetectionOptions | SegmentationOptions | VideoOptions | PointOptions,
    Field(discriminator="kind"),
]


def of_the_task(values: Any) -> Any:
    """Return the values of settings with the task's name in their options.

    A task that has none, or that does not exist, gets those of classification; whether it exists
    is for `filterwise.lab.tasks.make_task` to say.
    """
    if not isinstance(values, dict):
        return values
    options = values.get("options", {})
    if not isinstance(options, dict):
        return values
    task = values.get("task", "classification")
    known = task in {kind.model_fields["kind"].default for kind in KINDS}
    return {**values, "options": {**options, "kind": task if known else "classification"}}


KINDS: tuple[type[Frozen], ...] = (
    ClassificationOptions,
    DetectionOptions,
    SegmentationOptions,
    VideoOptions,
    PointOptions,
)
"""Every task's options, as `TaskOptions` has them."""
