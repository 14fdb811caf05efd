"""What a task asks beside data, model and optimization: one class for each task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from filterwise.lab.settings import Frozen

__all__ = ["ClassificationOptions", "DetectionOptions", "TaskOptions", "of_the_task"]

Count = Annotated[int, Field(ge=1)]
Part = Literal["backbone", "fpn", "heads"]
EVERYWHERE: tuple[Part, ...] = ("backbone", "fpn", "heads")


class ClassificationOptions(Frozen):
    """Classification of pictures asks for nothing more."""

    kind: Literal["classification"] = "classification"


class DetectionOptions(Frozen):
    """Objects in pictures: boxes, and masks where the model has them.

    The shorter side of a picture is brought to ``data.size``, unless the longer one would then be
    longer than `longest`.

    Attributes:
        train: Parts of the data to train on, as the folder names them: ``train2017``, or
            ``VOC2007/trainval``; none: what there is by its usual name.
        test: Likewise to test on.
        sizes: Shorter sides of which one is drawn for each training picture; none: ``data.size``.
        longest: Most pixels of the longer side.
        normalized: Where activation norms stand. The region proposals and the predictors have none.
        converted: Where the recipe applies, as far as there are layers.
        frozen: Batch norms of the backbone keep their statistics and affine values.
        channels: Of the pyramid and of the heads.
        proposals: Boxes of a picture that the heads are trained on.
    """

    kind: Literal["detection"] = "detection"
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    sizes: tuple[Annotated[int, Field(ge=8, le=4096)], ...] = ()
    longest: Annotated[int, Field(ge=8, le=8192)] = 1333
    normalized: tuple[Part, ...] = EVERYWHERE
    converted: tuple[Part, ...] = EVERYWHERE
    frozen: bool = False
    channels: Annotated[int, Field(ge=8, le=1024)] = 256
    proposals: Count = 512


TaskOptions = Annotated[
    ClassificationOptions | DetectionOptions,
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


KINDS: tuple[type[Frozen], ...] = (ClassificationOptions, DetectionOptions)
"""Every task's options, as `TaskOptions` has them."""
