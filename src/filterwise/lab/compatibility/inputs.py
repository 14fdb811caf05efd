"""The smallest input that an architecture takes, and what it is trained with."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from filterwise.lab.compatibility.architectures import build
from filterwise.lab.errors import LabError, reason
from filterwise.verify import floating_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from filterwise.lab.compatibility.architectures import Architecture

__all__ = ["Prepared", "loss_of", "prepare"]

BATCH = 2
SIDES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
CLIPS = ((4, 32), (8, 32), (8, 64), (16, 64), (16, 112), (16, 224))
DETECTION_SIDE = 64
BOXES = 16
FLOW_SIDE = 128
SEED = 0


@dataclass
class Prepared:
    """An architecture that runs.

    Attributes:
        model: The plain model, in training mode.
        size: Size of its input, in words.
        inputs: Positional arguments of a call in evaluation.
        more: What a call in training takes beside them.
        checked: Whether the plain model was seen to train a step and stay finite.
    """

    model: nn.Module
    size: str
    inputs: tuple[Any, ...]
    more: tuple[Any, ...] = ()
    checked: bool = False


@dataclass(frozen=True)
class _Try:
    """A size to try: the shape of the input, and what the builder is given for it."""

    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def prepare(one: Architecture) -> Prepared:
    """Build an architecture and find the smallest input of two samples that it trains on.

    Raises:
        LabError: If it takes none of the sizes; with what it said to the largest.
    """
    torch.manual_seed(SEED)
    if one.kind == "detection":
        return _detection(one)
    if one.kind == "optical flow":
        shape = (BATCH, 3, FLOW_SIDE, FLOW_SIDE)
        pictures = (torch.rand(shape) * 2 - 1, torch.rand(shape) * 2 - 1)
        return Prepared(build(one), f"2 x {FLOW_SIDE} px", pictures)
    is_video = one.kind == "video"
    error: Exception | None = None
    for size in (_clip(one, *clip) for clip in CLIPS) if is_video else _pictures(one):
        error = _fails(one, size)
        if error is None:
            break
    else:
        assert error is not None
        raise LabError(f"takes none of the sizes tried: {type(error).__name__}: {reason(error)}")
    torch.manual_seed(SEED)
    words = " x ".join(str(number) for number in size.shape[2:-1])
    # Pixels without a mean taken off: EquiNorm balances filters by positive means.
    return Prepared(build(one, size.options), f"{words} px", (torch.rand(size.shape),))


def _pictures(one: Architecture) -> Iterator[_Try]:
    """Yield sizes from the smallest on; at each, first without asking the builder for it."""
    if one.library == "timm":
        import timm

        config = timm.get_pretrained_cfg(one.name)
        channels, *sides = config.input_size if config else (3, 224, 224)
        fixed = bool(config and config.fixed_input_size)
        for side in SIDES:
            shape = (BATCH, channels, side, side)
            if side < max(sides):
                if not fixed:
                    yield _Try(shape)
                yield _Try(shape, {"img_size": side})
        yield _Try((BATCH, channels, *sides))
        return
    word = {"vision_transformer": "image_size", "maxvit": "input_size"}.get(one.family)
    for side in SIDES:
        options = {word: (side, side) if word == "input_size" else side} if word else {}
        yield _Try((BATCH, 3, side, side), options)


def _clip(one: Architecture, frames: int, side: int) -> _Try:
    options: dict[str, Any] = {}
    if one.family == "video.mvit":
        options = {"spatial_size": (side, side), "temporal_size": frames}
    return _Try((BATCH, 3, frames, side, side), options)


def _fails(one: Architecture, size: _Try) -> Exception | None:
    """Return what is raised at a size, trying without memory first; None if it trains."""
    for device in ("meta", "cpu"):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                with torch.device(device):
                    model = build(one, size.options)
                    x = torch.randn(size.shape)
                model(x)
                model.eval()(x)
        except Exception as error:
            # A size that does not fit fails on both; some models do not run on meta at all.
            found = error
            if _is_about_size(error):
                return error
        else:
            return None
    return found


def _is_about_size(error: Exception) -> bool:
    """Tell an error that the real device would raise too, and need not be asked about."""
    words = ("size", "shape", "divisible", "unexpected keyword", "Expected more than 1 value")
    return any(word in str(error) for word in words) and "meta" not in str(error)


def _detection(one: Architecture) -> Prepared:
    # Every box counts: with random weights none is sure enough to be found otherwise.
    word = "box_score_thresh" if "rcnn" in one.name else "score_thresh"
    options: dict[str, Any] = {word: 0.0}
    if "rcnn" in one.name:  # a head runs for each box
        options.update(rpn_post_nms_top_n_train=BOXES, rpn_post_nms_top_n_test=BOXES)
        options.update(box_batch_size_per_image=BOXES, box_detections_per_img=BOXES)
    if not one.family.startswith("detection.ssd"):  # they take one size
        options.update(min_size=DETECTION_SIDE, max_size=DETECTION_SIDE)
    model = build(one, options)
    if one.name.endswith("_fpn"):
        _freeze(model)
    pictures = [torch.rand(3, DETECTION_SIDE, DETECTION_SIDE) for _ in range(BATCH)]
    side = float(DETECTION_SIDE)
    target: dict[str, Tensor] = {
        "boxes": torch.tensor([[4.0, 6.0, side / 2, side / 2], [20.0, 10.0, side - 4, side - 8]]),
        "labels": torch.ones(2, dtype=torch.int64),
        "masks": torch.ones(2, DETECTION_SIDE, DETECTION_SIDE, dtype=torch.uint8),
        "keypoints": torch.full((2, 17, 3), side / 3),
    }
    targets = [copy.deepcopy(target) for _ in pictures]
    return Prepared(model, f"{DETECTION_SIDE} px", (pictures,), (targets,))


def _freeze(model: nn.Module) -> None:
    """Put frozen norms into the backbone, as these models have with published weights."""
    from torchvision.ops import FrozenBatchNorm2d

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                frozen = FrozenBatchNorm2d(child.num_features, child.eps)
                setattr(module, name, frozen)


def loss_of(output: object) -> Tensor:
    """Return a number to train on that grows no faster than the outputs do.

    Losses that the model computes itself are added up; any other output is weighted with fixed
    random numbers.
    """
    if isinstance(output, dict) and all(
        isinstance(value, torch.Tensor) and value.dim() == 0 for value in output.values()
    ):
        return torch.stack(list(output.values())).sum()
    generator = torch.Generator().manual_seed(SEED)
    parts = [
        (tensor.float() * torch.randn(tensor.shape, generator=generator)).mean()
        for tensor in floating_tensors(output)
        if tensor.requires_grad
    ]
    if not parts:
        raise LabError("its output in training depends on no parameter")
    return torch.stack(parts).sum()
