"""Pad and crop, flip, erase: on whole batches, with a draw of its own for each picture.

torchvision's transforms draw once for a whole batch; here its rules are followed for each picture,
in a few indexing operations on the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torchvision.transforms.v2 import functional

if TYPE_CHECKING:
    from torch import Tensor

    from filterwise.lab.training.settings import Augmentation

__all__ = ["Draws", "cropped", "draw", "erased"]

ERASED_AREA = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)
ATTEMPTS = 10


class Draws(NamedTuple):
    """What is done to each picture of a batch.

    Attributes:
        top: First row of the crop in the padded picture.
        left: First column.
        flipped: Whether left and right are exchanged, after the crop.
        erased: Top, left, height and width of what is erased, ``(pictures, 4)``; height 0: nothing.
    """

    top: Tensor
    left: Tensor
    flipped: Tensor
    erased: Tensor

    def part(self, which: slice, device: torch.device) -> Draws:
        """Return those of some pictures, on a device."""
        return Draws(*(each[which].to(device, non_blocking=True) for each in self))


def draw(
    pictures: int, height: int, width: int, rules: Augmentation, generator: torch.Generator
) -> Draws:
    """Draw what is done to each of some pictures of one size."""
    rows, columns = rules.crop or height, rules.crop or width
    spare = (height + 2 * rules.padding - rows, width + 2 * rules.padding - columns)
    corners = [torch.randint(0, most + 1, (pictures,), generator=generator) for most in spare]
    if rules.crop_probability < 1:
        stays = torch.rand(pictures, generator=generator) >= rules.crop_probability
        corners = [
            torch.where(stays, most // 2, corner)
            for most, corner in zip(spare, corners, strict=True)
        ]
    flipped = torch.rand(pictures, generator=generator) < rules.flip
    if rules.erasing:
        erased = _boxes(pictures, rows, columns, rules.erasing, generator)
    else:
        erased = torch.zeros(pictures, 4, dtype=torch.long)
    return Draws(corners[0], corners[1], flipped, erased)


def _boxes(
    pictures: int, rows: int, columns: int, probability: float, generator: torch.Generator
) -> Tensor:
    """Draw boxes by torchvision's rule: the first of ten that lies within the picture."""
    shape = (ATTEMPTS, pictures)
    share = torch.empty(shape).uniform_(*ERASED_AREA, generator=generator)
    ends = (math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1]))
    ratio = torch.empty(shape).uniform_(*ends, generator=generator).exp()
    area = share * rows * columns
    heights = (area * ratio).sqrt().round().long()
    widths = (area / ratio).sqrt().round().long()
    fits = (heights < rows) & (widths < columns)
    first = fits.to(torch.uint8).argmax(0, keepdim=True)
    happens = (torch.rand(pictures, generator=generator) < probability) & fits.any(0)
    height = heights.gather(0, first)[0] * happens
    width = widths.gather(0, first)[0] * happens
    place = torch.rand(2, pictures, generator=generator)
    top = (place[0] * (rows - height + 1)).long()
    left = (place[1] * (columns - width + 1)).long()
    return torch.stack([top, left, height, width], dim=1)


def cropped(pictures: Tensor, draws: Draws, rules: Augmentation, fill: Tensor) -> Tensor:
    """Pad, crop and flip each picture of ``(pictures, channels, height, width)``.

    Args:
        pictures: Of any dtype.
        draws: Of these pictures, on their device.
        rules: Padding and size.
        fill: What is padded with, for each channel.
    """
    _, channels, height, width = pictures.shape
    rows, columns = rules.crop or height, rules.crop or width
    device = pictures.device
    if rules.padding:
        values = [float(value) for value in fill.flatten()]
        pictures = functional.pad(pictures, [rules.padding] * 4, fill=values)
    down = draws.top[:, None] + torch.arange(rows, device=device)
    across = torch.arange(columns, device=device)
    across = torch.where(draws.flipped[:, None], across.flip(0), across) + draws.left[:, None]
    number = torch.arange(len(pictures), device=device)
    return pictures[
        number[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        down[:, None, :, None],
        across[:, None, None, :],
    ]


def erased(pictures: Tensor, draws: Draws) -> Tensor:
    """Put zeros into each picture's box."""
    height, width = pictures.shape[2:]
    top, left, tall, wide = (each[:, None] for each in draws.erased.unbind(1))
    down = torch.arange(height, device=pictures.device)
    across = torch.arange(width, device=pictures.device)
    rows = (down >= top) & (down < top + tall)
    columns = (across >= left) & (across < left + wide)
    return pictures.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
