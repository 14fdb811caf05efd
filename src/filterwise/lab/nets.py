"""The networks that are compared, written with BatchNorm and converted by recipe."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

import filterwise as fw
from filterwise.lab.models import named_model
from filterwise.lab.settings import needs_branch_gains

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NETS", "PlainNet", "ResidualNet", "build"]


class PlainNet(nn.Module):
    """Six weight layers in a row: five 3x3 convolutions, each with norm and ReLU, and a classifier.

    The map is halved twice, so an 8x8 picture ends as 2x2 and a norm still sees four values a
    channel of one picture; then it is averaged. The last layer is wide enough for group
    normalization to have four channels in each of its 32 groups: with one or two there would be
    next to nothing left in the average. Weights start as in He et al. (2015), fan-in.
    """

    WIDTHS = (16, 16, 32, 64, 128)
    STRIDES = (1, 1, 2, 1, 2)

    def __init__(self, channels: int, classes: int) -> None:
        """Build the net for pictures of `channels` channels and `classes` classes."""
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(self.WIDTHS, self.STRIDES, strict=True):
            layers += [_convolution(channels, width, stride), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        _start(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        return self.classifier(self.pool(self.features(pictures)).flatten(1))


class ResidualNet(nn.Module):
    """Fifty weight layers: a 3x3 convolution, 24 residual branches of two, and a classifier.

    A branch is ReLU, convolution, norm, ReLU, convolution, norm, and nothing but additions lies on
    the trunk (pre-activation, as in He et al. 2016, for which the gains of 1/sqrt(24) are meant).
    Where width or map changes, the trunk is averaged and padded with zero channels; no weights.
    """

    WIDTHS = (8, 16, 32)
    BLOCKS = 8

    def __init__(self, channels: int, classes: int) -> None:
        """Build the net for pictures of `channels` channels and `classes` classes."""
        super().__init__()
        width = self.WIDTHS[0]
        self.stem = nn.Sequential(_convolution(channels, width, 1), nn.BatchNorm2d(width))
        blocks: list[nn.Module] = []
        for stage, wider in enumerate(self.WIDTHS):
            for place in range(self.BLOCKS):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(_Block(width, wider, stride))
                width = wider
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, classes)
        _start(self)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits ``(pictures, classes)``."""
        trunk = self.blocks(self.stem(pictures))
        return self.classifier(self.pool(trunk.relu()).flatten(1))


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(),
            _convolution(channels, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _convolution(width, width, 1),
            nn.BatchNorm2d(width),
        )
        self.stride, self.added = stride, width - channels

    def forward(self, trunk: Tensor) -> Tensor:
        branch = self.branch(trunk)
        if self.stride > 1:
            trunk = nn.functional.avg_pool2d(trunk, self.stride, ceil_mode=True)
        if self.added:
            trunk = nn.functional.pad(trunk, (0, 0, 0, 0, 0, self.added))
        return trunk + branch


NETS: dict[str, type[nn.Module]] = {"plain": PlainNet, "residual": ResidualNet}
"""The lab's own networks; every other name is looked up in torchvision and timm."""


def _convolution(channels: int, width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)


def _start(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)


def build(net: str, recipe: str, channels: int, classes: int) -> tuple[nn.Module, fw.Report]:
    """Build a network and convert it by a recipe, with branch gains where they are needed.

    Draws its first weights from torch's global generator; under one seed every recipe starts from
    the same raw weights.

    Returns:
        The network, in training mode, and the report of its conversion.

    Raises:
        UsageError: If there is no such network.
        ConversionError: If the recipe does not fit it.
    """
    model = NETS[net](channels, classes) if net in NETS else named_model(net, channels, classes)
    with warnings.catch_warnings():
        # The report carries the same sentences; a comparison is where people try what warns.
        warnings.simplefilter("ignore", fw.FilterwiseWarning)
        report = fw.convert_(model, recipe)
        if needs_branch_gains(net, recipe):
            fw.initialize_(model, "branch")
    return model.train(), report
